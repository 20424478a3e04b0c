"""Fits an obfuscator and a restorer to a model that is already trained, label-free."""
