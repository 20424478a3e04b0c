"""Runs inside the trust zone: speaks the Open Inference Protocol to unchanged clients, sends only releases outside."""
