#!/bin/sh
# make_keys.sh FOLDER NODES PORT: a certificate authority, a server certificate for this machine, a key pair for each
# SuperNode, and the entry "silos" for `flwr run` in FOLDER/config.toml. For trials; in earnest, use your own authority.
set -eu
mkdir -p "$1" && cd "$1"
subject="/O=fedrebasin trial"
openssl req -x509 -newkey rsa:3072 -nodes -days 30 -subj "$subject/CN=authority" -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey rsa:3072 -nodes -subj "$subject/CN=localhost" -keyout server.key -out server.csr 2>/dev/null
echo "subjectAltName=DNS:localhost,IP:127.0.0.1" > names
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile names -out server.crt 2>/dev/null
node=0
while [ "$node" -lt "$2" ]; do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f "node$node"
    node=$((node + 1))
done
cat > config.toml <<END
[superlink]
default = "silos"

[superlink.silos]
address = "127.0.0.1:$3"
root-certificates = "$PWD/ca.crt"
END
