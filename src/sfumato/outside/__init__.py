"""Runs only outside the trust zone: restorer and tail. Never imports trusted, learn or attack."""
