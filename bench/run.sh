#!/usr/bin/env bash
# Measures nlb side by side with what one would use instead: bench/run.sh --help.
# Installs the peers that are missing, builds, and leaves the rest to bench/race.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
go=${GO:-go}

make -s -C "$root" need-go
case " $* " in
*' --help '* | *' -h '*) ;;
*)
	"$root/deploy/install-packages" bench
	make -s -C "$root" build-static
	;;
esac
# Static, so that it can run in emulated machines too, where there is no libc.
(cd "$root" && CGO_ENABLED=0 "$go" build -o bin/nlb-race ./bench/race)
exec "$root/bin/nlb-race" --nlb "$root/bin/nlb-static" --out "$root/bench/results/$(date -u +%Y%m%d-%H%M%S)" "$@"
