#!/usr/bin/env bash
# What the tests need from the system: bubblewrap (the sandbox of the code reward) and Chromium (in
# which the reports are looked at). Installs them where it may, else says how to.
missing=()
command -v bwrap > /dev/null || missing+=(bubblewrap)
command -v chromium > /dev/null || command -v chromium-browser > /dev/null \
    || command -v google-chrome > /dev/null || missing+=(chromium)
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" -eq 0 ] && command -v apt-get > /dev/null; then
    echo "installing ${missing[*]} with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}" \
        > /tmp/r1kern-tools.log 2>&1 && exit 0
    tail -3 /tmp/r1kern-tools.log >&2
fi
echo "tests that need ${missing[*]} will fail: install it" \
    "(Debian, Ubuntu: \`sudo apt install ${missing[*]}\`)" >&2
