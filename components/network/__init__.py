"""What a cluster has of its LAN: addresses for Services, and the ingress on one of them."""
