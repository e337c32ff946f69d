"""The target service: `TargetModelServer`, its queue, sessions and bounds, and the endpoint that RPC calls."""
