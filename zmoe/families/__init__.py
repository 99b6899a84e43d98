"""What zmoe knows of each model family: adapters of MoE blocks, routers, decoder layers."""
