"""The frozen target: loading, one forward pass, and the service around it. Import the submodules: this file stays light."""
