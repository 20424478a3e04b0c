"""Attackers, one a file, trained against a frozen obfuscator."""
