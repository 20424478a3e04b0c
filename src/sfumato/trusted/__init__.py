"""Runs only inside the trust zone: noise, and the single additional line."""
