#!/bin/sh
# A WireGuard tunnel between hosts: the private, encrypted network that RPC needs. Run it as root on each host.
#
#   wireguard.sh key                                          makes this host's key once, prints the public one
#   wireguard.sh up ADDRESS [PUBLIC_KEY ENDPOINT PEER]...     ADDRESS here, and three words for each other host
#   wireguard.sh down
#
# Two hosts, 192.0.2.5 and 192.0.2.6; KEY_OF_A and KEY_OF_B are what `key` printed on each:
#
#   A: wireguard.sh up 10.99.0.1 KEY_OF_B 192.0.2.6 10.99.0.2
#   B: wireguard.sh up 10.99.0.2 KEY_OF_A 192.0.2.5 10.99.0.1
#
# Then every worker gets rpc.interface=wg0 and rpc.registry=10.99.0.1:29711. Needs iproute2 and wireguard-tools, and
# the kernel's wireguard or else wireguard-go; with nftables it also keeps strangers off ADDRESS.
set -eu

# The tunnel's interface, its UDP port on all hosts, which must be open between them, and the private key's file.
INTERFACE=${INTERFACE:-wg0}
PORT=${PORT:-51820}
KEY=${KEY:-/etc/eagle_rpc/wireguard.key}

fail() {
  echo "wireguard: $1" >&2
  exit 2
}

usage() {
  fail "usage: wireguard.sh key | up ADDRESS [PUBLIC_KEY ENDPOINT PEER]... | down"
}

make_key() {
  if [ ! -e "$KEY" ]; then
    (umask 077 && mkdir -p "$(dirname "$KEY")" && wg genkey >"$KEY")
  fi
  wg pubkey <"$KEY"
}

make_interface() {
  ip link add dev "$INTERFACE" type wireguard 2>/dev/null && return
  command -v wireguard-go >/dev/null || fail "needs the kernel's wireguard, or wireguard-go"
  wireguard-go "$INTERFACE" >/dev/null 2>&1 || fail "wireguard-go could not make $INTERFACE"
}

# A host takes packets for any of its addresses on any interface: without this rule, neighbours could pass the
# tunnel by.
guard() {
  if ! command -v nft >/dev/null; then
    echo "wireguard: without nftables, neighbours on other interfaces can reach $1: close it in your firewall" >&2
    return
  fi
  nft -f - <<END
table ip eagle_rpc_$INTERFACE {
  chain guard {
    type filter hook input priority filter;
    iifname != { "lo", "$INTERFACE" } ip daddr $1 drop
  }
}
END
}

bring_up() {
  [ $(($# % 3)) -eq 1 ] || usage
  [ -r "$KEY" ] || fail "no key in $KEY: run wireguard.sh key first"
  address=$1
  shift
  make_interface
  trap 'bring_down' EXIT
  wg set "$INTERFACE" listen-port "$PORT" private-key "$KEY"
  while [ $# -gt 0 ]; do
    # The keepalive holds the way through a NAT open.
    wg set "$INTERFACE" peer "$1" endpoint "$2:$PORT" allowed-ips "$3/32" persistent-keepalive 25
    shift 3
  done
  guard "$address"
  ip address add "$address/24" dev "$INTERFACE"
  # Room for WireGuard's own headers in packets of 1500 bytes.
  ip link set "$INTERFACE" mtu 1420 up
  trap - EXIT
  echo "wireguard: $INTERFACE is up with $address"
}

bring_down() {
  ip link delete dev "$INTERFACE"
  if command -v nft >/dev/null; then
    nft delete table ip "eagle_rpc_$INTERFACE" 2>/dev/null || true
  fi
}

[ $# -ge 1 ] || usage
command=$1
shift
case $command in
  key) make_key ;;
  up) bring_up "$@" ;;
  down) bring_down ;;
  *) usage ;;
esac
