"""Kubernetes: the objects a run needs, as data, and the calls that make, watch and remove them."""
