"""What can be said of an obfuscator for every attacker, and what attackers trained against it still learned."""
