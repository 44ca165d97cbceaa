// Package vm runs test binaries in an emulated machine with one of Debian's
// kernels, for what the kernel at hand lacks: IPVS, flowtables, dummy links,
// netem, or simply another version.
//
//	host                                     guest (QEMU, microvm, TCG)
//	vmrun ── kernel, initramfs, job ───────► /init: mounts, modules, clock, lo
//	      ◄── frames over a virtio port ───    runs each binary in its folder
//	          output, files, exit status
//
// The program is vmrun, which go test -exec understands. The same file is the
// guest's /init, so that the two ends cannot disagree on how they talk.
//
// The console is the kernel's alone. It is shown when no exit status arrived.
package vm
