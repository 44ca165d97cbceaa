package balancer

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const keyFile = "hash.key"

// NewKey draws a random key.
func NewKey() HashKey {
	var key HashKey
	_, _ = rand.Read(key[:]) // never fails: it ends the program instead
	return key
}

// LoadKey reads the key of the state folder dir. A missing file is an error
// that matches fs.ErrNotExist.
func LoadKey(dir string) (HashKey, error) {
	path := filepath.Join(dir, keyFile)
	text, err := os.ReadFile(path)
	if err != nil {
		return HashKey{}, fmt.Errorf("hash key: %w", err)
	}
	var key HashKey
	text = bytes.TrimSuffix(text, []byte("\n"))
	if len(text) != hex.EncodedLen(len(key)) {
		return HashKey{}, keyError(path, fmt.Errorf("%d characters instead of %d", len(text), hex.EncodedLen(len(key))))
	}
	if _, err := hex.Decode(key[:], text); err != nil {
		return HashKey{}, keyError(path, err)
	}
	return key, nil
}

// keyError never offers to replace the file by itself: another key moves
// sticky clients to other targets, and balancers that share one would disagree.
func keyError(path string, err error) error {
	return fmt.Errorf("hash key: %s is damaged: %w; restore it from a backup or another balancer, "+
		"or remove it to draw a new key, which moves clients to other targets", path, err)
}

// LoadOrCreateKey reads the key of the state folder dir, and draws one if there
// is none. A new key is on disk, and its folder entry too, before it is
// returned: a key that was used must survive a power cut.
func LoadOrCreateKey(dir string) (HashKey, error) {
	key, err := LoadKey(dir)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	key = NewKey()
	if err := WriteStateFile(dir, keyFile, []byte(hex.EncodeToString(key[:])+"\n")); err != nil {
		return HashKey{}, fmt.Errorf("hash key: %w", err)
	}
	return key, nil
}
