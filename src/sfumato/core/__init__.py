"""The ground: what both sides of the trust boundary share. No I/O but artefacts, no import of the other zones."""
