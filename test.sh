#!/usr/bin/env bash
# Runs berth's tests on a machine that has only Go and git; what else they need comes from Debian's packages.
#
#   ./test.sh              everything that CI runs
#   ./test.sh GROUP...     only these groups
#   ./test.sh --list       names the groups
#
# FUZZTIME sets how long each fuzz target runs in the fuzz group (default 20s).
set -euo pipefail
cd "$(dirname "$0")"

default_groups=(lint unit conformance fuzz e2e up)

list() {
	cat <<'EOF'
lint   formatting, vet, staticcheck, known vulnerabilities, generated code, dependency list
unit   every package's own tests, with the race detector
conformance  the built binaries against the protocol, by peers of their own; prints a row an endpoint and method
e2e    the built binaries driven as a person would
up     berth up --check from source, as the README says
fuzz   each fuzz target for FUZZTIME, beyond the seeds that unit runs
load   a thousand agents on one server for five minutes, and its restart; only when named
release  a release for one platform, built twice with nothing in common, and its packages; only when named
bench  the measurements quoted in docs/performance.md; only when named
long   the tests that have a long variant (BERTH_LONG=1), at full length; only when named
EOF
}

# need COMMAND=PACKAGE... installs the packages of the commands that are missing.
need() {
	local missing=() pair
	for pair in "$@"; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	[ ${#missing[@]} -eq 0 ] && return
	local sudo=()
	[ "$(id -u)" -eq 0 ] || sudo=(sudo)
	command -v apt-get >/dev/null || {
		echo "test.sh: cannot install ${missing[*]}: this is no Debian system; install them and run again" >&2
		exit 1
	}
	echo "installing ${missing[*]}"
	"${sudo[@]}" apt-get update -qq
	DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

tools() {
	# Debian keeps some of these where an ordinary user does not look.
	PATH=$PATH:/usr/sbin:/sbin
	need gcc=gcc git=git sshd=openssh-server ip=iproute2 ss=iproute2 nft=nftables ssh=openssh-client vim=vim tmux=tmux \
		less=less man=man-db htop=htop unshare=util-linux iperf3=iperf3 dnsmasq=dnsmasq-base \
		dockerd=docker.io docker=docker.io script=bsdutils mkfs.ext4=e2fsprogs podman=podman busybox=busybox-static perl=perl-base systemd-nspawn=systemd-container \
		zsh=zsh fish=fish rsync=rsync curl=curl wget=wget dash=dash xauth=xauth Xvfb=xvfb xdpyinfo=x11-utils
}

# The terminal that ours are held against, at the versions of its lock file. Only the groups that run ./ptyhost/... need it.
judge() {
	need node=nodejs npm=npm
	local dir=internal/judge/testdata/xterm
	[ $dir/node_modules/.package-lock.json -nt $dir/package-lock.json ] || npm ci --prefix $dir --ignore-scripts --no-audit --no-fund
}

lint() {
	local unformatted
	unformatted=$(gofmt -l $(git ls-files '*.go'))
	[ -z "$unformatted" ] || { echo "not formatted: $unformatted" >&2; return 1; }
	go vet ./...
	go mod tidy -diff
	go mod verify
	go tool -modfile=internal/tools/go.mod staticcheck ./...
	need shellcheck=shellcheck
	shellcheck deploy/install.sh deploy/package/*.sh
	vulnerabilities
	generated
	dependencies
}

# The database of known vulnerabilities is not on every network; where it is, a finding fails the run.
vulnerabilities() {
	local out
	if out=$(go tool -modfile=internal/tools/go.mod govulncheck ./... 2>&1); then
		echo "govulncheck: none found"
	elif grep -q 'fetching vulnerabilities' <<<"$out" && ! grep -q '^Vulnerability #' <<<"$out"; then
		echo "govulncheck: NOT RUN, its database cannot be reached from here" >&2
	else
		echo "$out" >&2
		return 1
	fi
}

# The checked-in code is what the pinned generators make of the .proto files, byte for byte.
generated() {
	local before after
	before=$(sha256sum wire/*/*.pb.go)
	go generate ./wire
	after=$(sha256sum wire/*/*.pb.go)
	[ "$before" = "$after" ] || { echo "generated code differs from the .proto files: run go generate ./wire and commit" >&2; return 1; }
}

# What berthd links is kept in a file, so that growth shows in review.
dependencies() {
	diff -u cmd/berthd/dependencies.txt <(berthd_modules) || {
		echo "berthd's dependencies changed: review them, then run ./test.sh dependencies-update" >&2
		return 1
	}
}

berthd_modules() {
	go list -deps -tags "$(cat cmd/berthd/tags.txt)" -f '{{with .Module}}{{.Path}}{{end}}' ./cmd/berthd | sort -u
}

dependencies-update() { berthd_modules >cmd/berthd/dependencies.txt; }

unit() {
	tools
	judge
	# Some packages load both cores with real programs; two at a time keep their deadlines honest.
	go test -race -p 2 -timeout 10m $(go list ./... | grep -v '/e2e$\|/conformance$\|/bench/')
}

conformance() {
	tools
	# The table of endpoints and methods is at the end of what it prints.
	go test -count=1 -timeout 15m -v ./conformance | grep -v '^ *=== \|^ *--- PASS'
}

e2e() {
	tools
	go test -count=1 -timeout 15m -v ./e2e
	go test -count=1 -timeout 5m -v ./bench/agents ./bench/containers ./bench/logs ./bench/ports ./bench/ssh ./bench/terminal
}

up() { go run ./cmd/berth up --check; }

# Each fuzz target in a process of its own, some at a time: most wait for a pipe or a socket now and then.
# Only our own code and the framing right below it are instrumented. `go test -fuzz` does that to
# everything down to the standard library, which takes minutes to compile anew.
fuzz() {
	local dir package
	local -a instrument=()
	dir=$(mktemp -d)
	for package in github.com/berthd/berth/... github.com/hashicorp/yamux storj.io/drpc/... go.yaml.in/yaml/v3; do
		instrument+=("-gcflags=$package=-d=libfuzzer")
	done
	git grep -E '^func Fuzz[A-Za-z0-9_]*\(' -- '*_test.go' | sed -E 's#^(.*)/[^/]*:func (Fuzz[A-Za-z0-9_]*).*#\1 \2#' >"$dir/targets"
	for package in $(cut -d' ' -f1 "$dir/targets" | sort -u); do
		mkdir -p "$dir/$package"
		go test -c "${instrument[@]}" -o "$dir/$package/fuzz" "./$package"
	done
	export -f fuzz_one
	FUZZ_CACHE=$(go env GOCACHE)/fuzz xargs -P $((3 * $(nproc))) -L 1 bash -c 'fuzz_one "$@"' fuzz "$dir" <"$dir/targets"
	echo "$(wc -l <"$dir/targets") targets, ${FUZZTIME:-20s} each"
	rm -rf "$dir"
}

# fuzz_one DIR PACKAGE TARGET runs one target. An input that fails is kept in the package's testdata/fuzz.
# Go's fuzzer now and then reports the end of its own time as a failure, "context deadline exceeded" and no input
# (go.dev/issue/48591); an input that hangs or fails reads otherwise.
fuzz_one() {
	local log=$1/$2/$3.log
	fuzz_ended() { grep -qx '    context deadline exceeded' "$log" && ! grep -q 'Failing input\|hung or terminated\|panic' "$log"; }
	if (cd "$2" && "$1/$2/fuzz" -test.run '^$' -test.fuzz "^$3\$" -test.fuzztime "${FUZZTIME:-20s}" -test.parallel 1 -test.fuzzminimizetime 100x \
		-test.fuzzcachedir "$FUZZ_CACHE/$2") >"$log" 2>&1 || fuzz_ended; then
		echo "fuzz $2 $3: $(grep '^fuzz: elapsed' "$log" | grep -v '(0/sec)' | tail -1 | sed 's/.*execs/execs/')"
	else
		echo "fuzz $2 $3 FAILED" && cat "$log"
		return 1
	fi
} >&2

load() {
	go run ./bench/agents
	go run ./bench/agents -stock -for 30s
}

# Tests that read BERTH_LONG do in CI a part of what they do here; one line a package.
long() {
	tools
	need emacs=emacs-nox ansible=ansible-core # some 300 MB together
	judge
	export BERTH_LONG=1
	go test -count=1 -timeout 60m -v ./ptyhost/...
	go test -count=1 -timeout 60m -v -run 'TestTerminals|TestShell|TestOpenSSH|TestServerKilled|TestLedger|TestLastStatus|TestContainerStop|TestStill' ./e2e
	go test -count=1 -timeout 10m -v -run 'TestMany|TestContainerExec' ./containers ./internal/berthd
	go test -count=1 -timeout 10m -v -run TestSameAsSS ./ports
	go test -count=1 -timeout 10m -v -run TestDamage ./reporter
	go test -count=1 -timeout 20m -v -run TestResume ./cmd/berth
}

# The second time from another place and with an empty cache: both must make the same bytes.
release() {
	need rpm=rpm
	local dir
	dir=$(mktemp -d)
	go run ./internal/release --platform linux/amd64 --out "$dir/dist"
	(cd "$dir/dist" && sha256sum --quiet -c SHA256SUMS)
	dpkg-deb --contents "$dir"/dist/*.deb
	rpm -qp --nosignature --list "$dir"/dist/*.rpm
	GOCACHE=$dir/cache go run ./internal/release --platform linux/amd64 --check "$dir/dist"
	rm -rf "$dir"
}

bench() {
	tools
	go run ./bench/daemon
	go run ./bench/mesh
	go run ./bench/ports
	go run ./bench/containers
	go run ./bench/terminal
	go run ./bench/ssh
	need rsyslogd=rsyslog
	go run ./bench/logs
}

case ${1:-} in
--list)
	list
	exit
	;;
esac
groups=("$@")
[ ${#groups[@]} -gt 0 ] || groups=("${default_groups[@]}")
for group in "${groups[@]}"; do
	declare -F "$group" >/dev/null || { echo "test.sh: no group $group; --list names them" >&2; exit 2; }
	echo "== $group"
	start=$SECONDS
	"$group"
	echo "== $group passed in $((SECONDS - start)) s"
done
