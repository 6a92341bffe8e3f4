package audit

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

// A Key signs the checkpoints of one log. Its name is the log's origin.
type Key struct {
	Signer   note.Signer
	Verifier note.Verifier
	VKey     string // the verifier as signed-note writes it, for others to keep
}

// Origin is the name of the log that the key signs.
func (k *Key) Origin() string { return k.Verifier.Name() }

// NewOrigin returns a name for a log that the operator did not name.
func NewOrigin() string {
	b := make([]byte, 8)
	if _, err := rand.Read(b); err != nil {
		panic("audit: no randomness: " + err.Error())
	}
	return "tidemark/" + hex.EncodeToString(b)
}

// OpenKey reads the key in dir. Without one it makes it, for origin, unless
// fresh is false: a log that was signed before must not go on under another
// key, so that is fs.ErrNotExist.
//
// log.key holds the private key in signed-note's form (mode 0600), log.vkey the
// verifier to give away. The verifier is derived again when only it is missing.
func OpenKey(dir, origin string, fresh bool) (*Key, error) {
	keyPath := filepath.Join(dir, "log.key")
	skey, err := os.ReadFile(keyPath)
	switch {
	case errors.Is(err, fs.ErrNotExist) && fresh:
		return makeKey(dir, origin)
	case err != nil:
		return nil, fmt.Errorf("log key: %w", err)
	}
	k, err := parseKey(strings.TrimSpace(string(skey)))
	if err != nil {
		return nil, fmt.Errorf("log key %s: %w", keyPath, err)
	}
	if origin != "" && k.Origin() != origin {
		return nil, fmt.Errorf("log key %s is for the log %s, not %s", keyPath, k.Origin(), origin)
	}
	vkeyPath := filepath.Join(dir, "log.vkey")
	if _, err := os.Stat(vkeyPath); errors.Is(err, fs.ErrNotExist) {
		err = WriteFile(vkeyPath, []byte(k.VKey+"\n"), 0o644)
		if err != nil {
			return nil, err
		}
	}
	return k, nil
}

func makeKey(dir, origin string) (*Key, error) {
	skey, vkey, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		return nil, fmt.Errorf("make log key: %w", err)
	}
	if err := WriteFile(filepath.Join(dir, "log.key"), []byte(skey+"\n"), 0o600); err != nil {
		return nil, err
	}
	if err := WriteFile(filepath.Join(dir, "log.vkey"), []byte(vkey+"\n"), 0o644); err != nil {
		return nil, err
	}
	return parseKey(skey)
}

// parseKey reads PRIVATE+KEY+name+hash+key (c2sp.org/signed-note). The verifier
// follows from the seed.
func parseKey(skey string) (*Key, error) {
	signer, err := note.NewSigner(skey)
	if err != nil {
		return nil, err
	}
	vkey, err := verifierKey(skey)
	if err != nil {
		return nil, err
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, err
	}
	return &Key{signer, verifier, vkey}, nil
}

// verifierKey derives the encoded verifier of an encoded Ed25519 signer.
func verifierKey(skey string) (string, error) {
	fields := strings.SplitN(skey, "+", 5) // the last is base64 and may have a + itself
	if len(fields) != 5 {
		return "", errors.New("malformed signer key")
	}
	key, err := base64.StdEncoding.DecodeString(fields[4])
	if err != nil || len(key) != 1+ed25519.SeedSize {
		return "", errors.New("malformed signer key")
	}
	return note.NewEd25519VerifierKey(fields[2], ed25519.NewKeyFromSeed(key[1:]).Public().(ed25519.PublicKey))
}

// WriteFile replaces path by data so that a crash leaves the old or the new
// file, whole, and a power cut after it returned the new one.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	tmp, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return err
	}
	if runtime.GOOS == "windows" {
		return nil // has no fsync of directories; NTFS journals the rename
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
