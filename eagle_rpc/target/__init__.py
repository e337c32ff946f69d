"""The frozen target: loading, and one exact forward pass. Import the submodules: this file stays light."""
