package vm

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sort"
	"strings"
)

// File types in a mode of an archive (inode(7)).
const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
	typeChar = 0o020000
)

// An entry is a file of an initramfs.
type entry struct {
	mode         uint32 // type and permissions
	content      []byte // of a file; the target of a link
	major, minor uint32 // of a device
}

// A Tree is the content of an initramfs, by absolute path. The folders above
// each path come into being by themselves.
type Tree map[string]entry

// File adds a file.
func (t Tree) File(name string, perm fs.FileMode, content []byte) {
	t[clean(name)] = entry{mode: typeFile | uint32(perm.Perm()), content: content}
}

// Link adds a symbolic link.
func (t Tree) Link(name, target string) {
	t[clean(name)] = entry{mode: typeLink | 0o777, content: []byte(target)}
}

// Dir adds a folder. Perm has all twelve bits as in chmod(2), the sticky one included.
func (t Tree) Dir(name string, perm uint32) {
	t[clean(name)] = entry{mode: typeDir | perm}
}

// Char adds a character device.
func (t Tree) Char(name string, perm, major, minor uint32) {
	t[clean(name)] = entry{mode: typeChar | perm, major: major, minor: minor}
}

// merged are the folders that Debian has merged into /usr: a program says
// /lib64/ld-linux-x86-64.so.2 where the file is /usr/lib64/….
var merged = []string{"bin", "sbin", "lib", "lib64"}

// clean is the path of a file in the archive: no leading slash, below /usr
// where the system has links.
func clean(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for _, dir := range merged {
		if strings.HasPrefix(name, dir+"/") {
			return "usr/" + name
		}
	}
	return name
}

// Encode writes the tree as a cpio archive that the kernel unpacks, padded so
// that another may follow it: format "newc", see
// https://docs.kernel.org/driver-api/early-userspace/buffer-format.html.
// The same tree always makes the same bytes.
func (t Tree) Encode(w io.Writer) error {
	all := make(Tree, 2*len(t))
	for name, e := range t {
		all[name] = e
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, have := t[dir]; !have {
				all[dir] = entry{mode: typeDir | 0o755}
			}
		}
	}
	names := make([]string, 0, len(all))
	for name := range all {
		names = append(names, name)
	}
	sort.Strings(names) // a folder before what is in it

	out := &counter{w: w}
	for i, name := range names {
		if err := writeEntry(out, i+1, name, all[name]); err != nil {
			return err
		}
	}
	if err := writeEntry(out, 0, "TRAILER!!!", entry{}); err != nil {
		return err
	}
	return out.pad(512)
}

func writeEntry(out *counter, inode int, name string, e entry) error {
	links := 1
	if e.mode&0o170000 == typeDir {
		links = 2
	}
	// Magic; inode, mode, uid, gid, links, mtime, size; device; device this
	// stands for; length of the name with its zero byte; checksum.
	_, err := fmt.Fprintf(out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, e.mode, 0, 0, links, 0, len(e.content), 0, 0, e.major, e.minor, len(name)+1, 0, name)
	if err != nil {
		return err
	}
	if err := out.pad(4); err != nil {
		return err
	}
	if _, err := out.Write(e.content); err != nil {
		return err
	}
	return out.pad(4)
}

// A counter knows how much was written, for padding.
type counter struct {
	w io.Writer
	n int
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += n
	return n, err
}

func (c *counter) pad(to int) error {
	if rest := c.n % to; rest != 0 {
		_, err := c.Write(bytes.Repeat([]byte{0}, to-rest))
		return err
	}
	return nil
}
