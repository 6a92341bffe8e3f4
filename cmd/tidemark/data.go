package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gofrs/flock"
)

// A dataFolder is the folder of all state, held by this process alone.
type dataFolder struct {
	path string
	lock *flock.Flock
}

const readme = `This is the data folder of tidemark, a registry mirror that remembers.

blobs/      cached content by digest, the blobs folder of an OCI image layout.
            Safe to delete while tidemark is stopped: it is fetched again.
partial/    downloads and imports in progress. Safe to delete while tidemark is
            stopped.
audit.db    the ledger: what every tag meant, and when it moved. Keep it; it
            cannot be made again. Back it up with SQLite's own tools. While it
            is in use, and after a crash, audit.db-wal and audit.db-shm belong
            to it: never put another audit.db beside them.
log.key     signs the ledger. Keep it secret, and keep it.
log.vkey    verifies the ledger. Give it to whoever should be able to check it.
anchor      the last signed checkpoint, to notice an older or changed audit.db.
            Do not restore it with one: that is what it is there to notice.
            With a name behind these three they are of a log that was forked from.
tls/        certificates made for this server, and the internal CA.
lock        held by the server that uses this folder; lock.holder says which.
`

// openData makes the folder if it is not there, and takes it.
func openData(path string) (*dataFolder, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	d := &dataFolder{path, flock.New(filepath.Join(path, "lock"))}
	ok, err := d.lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("data folder %s: lock: %w", path, err)
	}
	if !ok {
		return nil, fmt.Errorf("data folder %s is used by another server: %s", path, d.holder())
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	holder := fmt.Sprintf("process %d on %s, since %s\n", os.Getpid(), host, time.Now().UTC().Format(time.RFC3339))
	// Beside the lock, for a file that is locked cannot be read everywhere.
	for name, text := range map[string]string{"lock.holder": holder, "README": readme} {
		if err := os.WriteFile(d.file(name), []byte(text), 0o644); err != nil {
			d.Close()
			return nil, fmt.Errorf("data folder: %w", err)
		}
	}
	return d, nil
}

// holder is what the server that has the lock wrote about itself.
func (d *dataFolder) holder() string {
	text, err := os.ReadFile(d.file("lock.holder"))
	if err != nil || len(text) == 0 {
		return "it does not say which"
	}
	return strings.TrimSpace(string(text))
}

func (d *dataFolder) file(name string) string { return filepath.Join(d.path, name) }

// Close gives the folder back.
func (d *dataFolder) Close() error { return d.lock.Unlock() }
