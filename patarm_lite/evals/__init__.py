"""Measuring judges: attacks and what they change."""
