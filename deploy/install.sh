#!/bin/sh
# Installs berthd, berth's workspace agent, and can be run again at any time. docs/install.md has more.
#
#   curl -fsSL https://berth.example.com/install.sh | sh -s -- --auth aws-instance-identity
#
# Everything happens in main, which the last line calls: a script that was cut off on its way does nothing.

# A control server fills these in when it hands the script out at /install.sh.
server_url=
server_version=
server_sums=

usage() {
	cat <<'END'
usage: install.sh [--pin SHA256] [--prefix DIR] [FLAG...]

Downloads berthd from a control server, checks it, and installs it. For root on a machine with
systemd, "berthd install" then makes it a service; every other FLAG is for that, and so are
BERTH_TOKEN, BERTH_AUTH and the like. Otherwise it says how to start berthd.

  --pin SHA256   sum that the archive must have, in place of the server's own word (BERTH_PIN)
  --prefix DIR   only put the programs into DIR/bin (BERTH_PREFIX); without it that is
                 /usr/local/bin for root and ~/.local/bin for others

Variables: BERTH_URL (the control server), BERTH_CA_FILE (PEM file of certificates to trust),
BERTH_HEADER (key=value headers, separated by commas), https_proxy, no_proxy, TMPDIR.
END
}

say() { printf 'install.sh: %s\n' "$*" >&2; }

fail() {
	say "$*"
	exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# platform prints the name of this machine's archive.
platform() {
	[ "$(uname -s)" = Linux ] || fail "berthd runs on Linux, and this is $(uname -s)"
	case $(uname -m) in
	x86_64 | amd64) echo berthd-linux-amd64.tar.gz ;;
	aarch64 | arm64) echo berthd-linux-arm64.tar.gz ;;
	armv7* | armv8l) echo berthd-linux-armv7.tar.gz ;;
	*) fail "there is no berthd for $(uname -m): only for x86_64, aarch64 and armv7l" ;;
	esac
}

# pinned NAME prints the sum that the server gave for an archive.
pinned() {
	while read -r sum name; do
		if [ "$name" = "$1" ]; then
			echo "$sum"
		fi
	done <<END
$server_sums
END
}

# sha256 FILE prints its SHA-256 in hex.
sha256() {
	if have sha256sum; then
		sum=$(sha256sum <"$1")
	elif have shasum; then
		sum=$(shasum -a 256 <"$1")
	elif have busybox; then
		sum=$(busybox sha256sum <"$1")
	elif have openssl; then
		sum=$(openssl dgst -sha256 -r <"$1")
	else
		fail "cannot check the download: there is none of sha256sum, shasum, busybox and openssl here; install one"
	fi
	echo "${sum%% *}"
}

size() {
	if [ -f "$1" ]; then
		wc -c <"$1" | tr -d ' '
	else
		echo 0
	fi
}

# headers prints those of BERTH_HEADER, one a line.
headers() { printf '%s\n' "${BERTH_HEADER:-}" | tr ',' '\n' | sed -n 's/^ *\([^=]*\)=/\1: /p'; }

# configure writes what a download needs into files, where no list of processes shows it.
configure() {
	headers | sed 's/[\\"]/\\&/g; s/.*/header = "&"/' >"$tmp/curlrc"
	headers | sed 's/^/header = /' >"$tmp/wgetrc"
	if [ -n "${BERTH_CA_FILE:-}" ]; then
		echo "cacert = \"$BERTH_CA_FILE\"" >>"$tmp/curlrc"
		echo "ca_certificate = $BERTH_CA_FILE" >>"$tmp/wgetrc"
	fi
	# Some tools read the small names only.
	for name in http_proxy https_proxy no_proxy; do
		big=$(echo "$name" | tr '[:lower:]' '[:upper:]')
		eval "value=\${$name:-\${$big:-}}"
		[ -z "$value" ] || eval "export $name=\$value"
	done
}

# get TOOL URL FILE downloads, going on where FILE ends. Tools give up when nothing has come for half a minute.
get() {
	case $1 in
	curl) curl -fsSL -K "$tmp/curlrc" --connect-timeout 15 --speed-time 30 --speed-limit 1 -C - -o "$3" "$2" ;;
	wget) WGETRC=$tmp/wgetrc wget -nv -t 1 -c -T 30 -O "$3" "$2" ;;
	# Busybox's, by whichever name: its option -T crashes in some builds; by itself it waits for a quarter of an hour.
	small) wget -c -O "$3" "$2" ;;
	busybox) busybox wget -c -O "$3" "$2" ;;
	esac
}

# A page says what it is within its first lines.
is_page() { head -c 1024 "$1" | tr -d '\000' | grep -qi '<!doctype html\|<html'; }

title() {
	head -c 4096 "$1" | tr '\n' ' ' | sed -n 's/.*<[Tt][Ii][Tt][Ll][Ee][^>]*>\([^<]*\)<.*/\1/p' | tr -cd ' -~' | cut -c 1-80
}

# judge FILE tells whether a download is what was asked for. If not, why says what it is, and again whether to try again.
judge() {
	got=$(sha256 "$1")
	if [ "$got" = "$pin" ]; then
		return 0
	fi
	if is_page "$1"; then
		why="you downloaded a login page, or another web page: \"$(title "$1")\", where $source should be. A proxy or gateway on the way answers in the server's place: log in there, or go around it (no_proxy), and check the server's URL"
	elif gzip -t "$1" 2>/dev/null; then
		why="the archive at $source has the SHA-256 $got, but $pin is pinned. Nothing was installed. If the server was upgraded since you got this script or the pin, get them anew"
	else
		why="what came from $source is damaged or broken off ($(size "$1") bytes)"
		again=yes
	fi
	return 1
}

# download gets $source into FILE by whichever tool brings what is pinned; in five rounds, with pauses that grow.
download() {
	tools=
	! have curl || tools=curl
	if have wget && wget --version >/dev/null 2>&1; then
		tools="$tools wget"
	elif have wget; then
		tools="$tools small"
	fi
	! have busybox || tools="$tools busybox"
	[ -n "$tools" ] || fail "cannot download: there is none of curl, wget and busybox here; install one"
	pause=${BERTH_RETRY_PAUSE:-1}
	for left in 4 3 2 1 0; do
		again=
		for tool in $tools; do
			before=$(size "$1")
			if get "$tool" "$source" "$1" 2>"$tmp/errors"; then
				if judge "$1"; then
					return
				fi
			else
				why="cannot download $source: $tool said: $(tr '\r' '\n' <"$tmp/errors" | tail -n 1)"
				again=yes
				# What came so far is kept while it grows, for the next attempt to go on from.
				if [ "$(size "$1")" -gt "$before" ] && ! is_page "$1"; then
					continue
				fi
			fi
			rm -f "$1"
		done
		if [ -z "$again" ] || [ "$left" = 0 ]; then
			fail "$why"
		fi
		say "$why; trying again in $pause s"
		sleep "$pause"
		pause=$((pause * 2))
	done
}

# current tells whether the programs in $bin came from the pinned archive and are as they were.
current() {
	[ -x "$bin/berthd" ] && [ -x "$bin/berthd-ptyhost" ] && [ -f "$stamp" ] &&
		[ "$(cat "$stamp")" = "$pin $(sha256 "$bin/berthd") $(sha256 "$bin/berthd-ptyhost")" ]
}

# place puts the programs of an archive into $bin, each in one step, and notes where they came from.
place() {
	mkdir "$tmp/unpacked"
	gzip -dc "$1" | (cd "$tmp/unpacked" && tar -xf -)
	new=$bin/.berthd.$$ # on the file system of $bin
	mkdir -p "$new" "${stamp%/*}" || fail "cannot write to $prefix: choose another directory with --prefix"
	for program in berthd-ptyhost berthd; do
		[ -f "$tmp/unpacked/$program" ] || fail "the archive at $source holds no $program"
		cp "$tmp/unpacked/$program" "$new/$program" || fail "cannot write to $bin"
		chmod 755 "$new/$program"
	done
	"$new/berthd" version >/dev/null || fail "berthd does not run on this machine, so nothing was changed: is $bin on a file system mounted noexec?"
	for program in berthd-ptyhost berthd; do
		mv -f "$new/$program" "$bin/$program"
	done
	echo "$pin $(sha256 "$bin/berthd") $(sha256 "$bin/berthd-ptyhost")" >"$stamp"
}

main() {
	set -eu
	pin=${BERTH_PIN:-}
	prefix=${BERTH_PREFIX:-}
	export BERTH_URL="${BERTH_URL:-$server_url}"
	left=$#
	while [ "$left" -gt 0 ]; do
		arg=$1
		shift
		left=$((left - 1))
		case $arg in
		-h | --help)
			usage
			return
			;;
		--pin=*) pin=${arg#*=} ;;
		--prefix=*) prefix=${arg#*=} ;;
		--pin | --prefix)
			[ "$left" -gt 0 ] || fail "$arg needs a value"
			case $arg in
			--pin) pin=$1 ;;
			*) prefix=$1 ;;
			esac
			shift
			left=$((left - 1))
			;;
		*) set -- "$@" "$arg" ;;
		esac
	done

	[ -n "$BERTH_URL" ] || fail "which control server? Set BERTH_URL, such as https://berth.example.com, or get this script from it: https://berth.example.com/install.sh"
	archive=$(platform)
	source=${BERTH_URL%/}/bin/$archive
	[ -n "$pin" ] || pin=$(pinned "$archive")
	[ -n "$pin" ] || fail "there is no sum to check $archive against: get this script from the control server ($BERTH_URL/install.sh), or give --pin SHA256"
	pin=$(echo "$pin" | tr 'A-F' 'a-f')
	case $pin in
	*[!0-9a-f]*) fail "$pin is no SHA-256: one has 64 digits from 0 to f" ;;
	esac
	[ ${#pin} = 64 ] || fail "$pin is no SHA-256: one has 64 digits from 0 to f"
	sha256 /dev/null >/dev/null
	service=
	if [ -z "$prefix" ]; then
		if [ "$(id -u)" = 0 ]; then
			prefix=/usr/local
			[ ! -d /run/systemd/system ] || service=yes
		else
			prefix=$HOME/.local
		fi
	fi
	bin=$prefix/bin
	stamp=$prefix/share/berthd/installed

	if current; then
		say "$bin/berthd is up to date${server_version:+ ($server_version)}"
	else
		new=
		umask 077
		tmp=$(mktemp -d) || fail "cannot make a temporary directory: set TMPDIR to one that can be written to"
		trap 'rm -rf "$tmp" "$new"' EXIT
		trap 'exit 129' HUP
		trap 'exit 130' INT
		trap 'exit 143' TERM
		configure
		download "$tmp/$archive"
		umask 022
		place "$tmp/$archive"
		say "installed $bin/berthd${server_version:+ ($server_version)}"
	fi

	if [ -n "$service" ]; then
		"$bin/berthd" install --yes "$@"
	else
		say "to start it: BERTH_URL=$BERTH_URL $bin/berthd run${*:+ $*}"
		say "it proves who it is by a token in BERTH_TOKEN or --token-file FILE, or on a cloud's machine by --auth auto"
	fi
}

# The braces: a shell runs nothing of a line like this before it has seen its end.
{ main "$@"; }
