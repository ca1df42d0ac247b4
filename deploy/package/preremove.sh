#!/bin/sh
# dpkg says "remove", rpm 0; with an upgrade the service goes on until the new one is there.
set -e
if [ "$1" = remove ] || [ "$1" = 0 ]; then
	if [ -d /run/systemd/system ]; then
		systemctl disable --now berthd.service # stop scripts run, terminals end
	fi
fi
