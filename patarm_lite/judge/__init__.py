"""Running a finished judge. `loading` checks a file before it may enter this process, `llamacpp` runs it, `grammar`
keeps what it writes in the protocol's form. Nothing here imports torch."""
