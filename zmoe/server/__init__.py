"""An HTTP server over a cluster: a process for the clients, and one for the cluster."""
