"""Nodes on one machine: network namespaces, links that are limited, the ranks on them."""
