#!/bin/bash
# Puts the notebooks into the home directory, and leaves what is there already as it is.
target="/home/${NB_USER:-jovyan}/sfumato"
mkdir -p "$target"
cp -rn /usr/local/share/sfumato/notebooks/. "$target"/
if [ "$(id -u)" = 0 ]; then
    chown -R "${NB_UID:-1000}:${NB_GID:-100}" "$target"
fi
