#!/bin/sh
# The conventional way to build the network of one sandbox: one process per change.
#
#     conventional-slot.sh create|destroy PREFIX INDEX UPLINK
#
# The same slot as rewake's: same names, addresses, NAT and walls, built with ip,
# sysctl and iptables as such hosts do it today. Runs in the caller's namespace.
set -eu
action=$1 prefix=$2 i=$3 uplink=$4
ns=$prefix-$i veth=${prefix}v$i
host=10.12.$((2 * i / 256)).$((2 * i % 256))
inside=10.12.$(((2 * i + 1) / 256)).$(((2 * i + 1) % 256))
reach=10.11.$((i / 256)).$((i % 256))
guest=169.254.0.21 gateway=169.254.0.22

in_ns() { ip netns exec "$ns" "$@"; }

case $action in
create)
    ip netns add "$ns"
    ip link add "$veth" type veth peer name eth0 netns "$ns"
    ip addr add "$host/31" dev "$veth"
    ip link set "$veth" up
    ip -n "$ns" link set lo up
    ip -n "$ns" addr add "$inside/31" dev eth0
    ip -n "$ns" link set eth0 up
    ip -n "$ns" tuntap add dev tap0 mode tap vnet_hdr
    ip -n "$ns" link set tap0 address 02:fc:00:00:00:06
    ip -n "$ns" addr add "$gateway/30" dev tap0
    ip -n "$ns" link set tap0 up
    ip -n "$ns" neigh replace "$guest" lladdr 02:fc:00:00:00:05 dev tap0 nud permanent
    ip -n "$ns" route add default via "$host"
    in_ns sysctl -q -w net.ipv4.ip_forward=1
    in_ns sysctl -q -w net.ipv6.conf.all.disable_ipv6=1
    in_ns iptables -w -t nat -A POSTROUTING -o eth0 -s "$guest" -j SNAT --to-source "$inside"
    in_ns iptables -w -t nat -A PREROUTING -i eth0 -d "$reach" -j DNAT --to-destination "$guest"
    ip route add "$reach/32" via "$inside" dev "$veth"
    iptables -w -A FORWARD -i "$veth" ! -s "$inside" -j DROP
    iptables -w -A FORWARD -i "$veth" -o "$uplink" -j ACCEPT
    iptables -w -A FORWARD -i "$uplink" -o "$veth" -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
    iptables -w -t nat -A POSTROUTING -s "$inside" -o "$uplink" -j MASQUERADE
    ;;
destroy)
    iptables -w -t nat -D POSTROUTING -s "$inside" -o "$uplink" -j MASQUERADE
    iptables -w -D FORWARD -i "$uplink" -o "$veth" -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
    iptables -w -D FORWARD -i "$veth" -o "$uplink" -j ACCEPT
    iptables -w -D FORWARD -i "$veth" ! -s "$inside" -j DROP
    ip link del "$veth"
    ip netns del "$ns"
    ;;
*)
    echo "usage: $0 create|destroy PREFIX INDEX UPLINK" >&2
    exit 2
    ;;
esac
