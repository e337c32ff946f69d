"""The target service: server, queue, sessions and bounds, the endpoint that RPC calls, and the lifecycle."""
