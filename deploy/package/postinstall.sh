#!/bin/sh
# dpkg says "configure" and the version that was there before, if one was; rpm says how many are there now.
set -e
case $1 in
configure) before=$2 ;;
1) before= ;;
[2-9]*) before=another ;;
*) exit 0 ;;
esac
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
if [ -n "$before" ]; then
	if [ -d /run/systemd/system ]; then
		systemctl try-restart berthd.service # terminals live through it
	fi
	exit 0
fi
cat <<'END'
berthd is installed, and does not run yet. To have systemd start it, now and at each boot:
  berthd install --url https://berth.example.com --token-file FILE
or, on a machine of AWS, Azure or Google Cloud, which proves itself:
  berthd install --url https://berth.example.com --auth auto
END
