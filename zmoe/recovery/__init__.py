"""How a run goes on without a lost node: views, adoption, the recovery protocol. Pure."""
