package audit

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit/taglog"
)

// A Forker is a log that can go on under another origin.
type Forker interface {
	Log
	Origin(ctx context.Context) (string, error)

	// Fork makes origin the name of the log and appends e, in one transaction.
	Fork(ctx context.Context, origin string, e Event) (int64, error)
}

// ErrNoFork reports a log that is well, as far as can be told here.
var ErrNoFork = errors.New("the log contains what was signed before: there is nothing to fork from")

// Fork has the log whose key and anchor are in dir go on under a new origin and
// a new key, because the old one's checkpoints do not fit it any more. The first
// entry of the new log that the old one does not have says so. The old key,
// verifier and anchor are kept beside the new ones, under the old origin's name.
// After a crash it can be called again and goes on where it was.
//
// A log that contains what the anchor says is ErrNoFork, unless force is set: an
// anchor that was restored together with the database knows nothing of what was
// signed after both.
func Fork(ctx context.Context, dir string, log Forker, reason string, force bool, now time.Time) (origin string, err error) {
	old, err := log.Origin(ctx)
	if err != nil {
		return "", err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	next, err := nextKey(path("log.key.new"))
	if err != nil {
		return "", err
	}
	if next.Origin() != old { // else a crash came between the database and the files
		signed, err := forkable(ctx, dir, log, old)
		if err != nil && !(force && errors.Is(err, ErrNoFork)) {
			return "", errors.Join(err, os.Remove(path("log.key.new")))
		}
		tree, err := log.Tree(ctx)
		if err != nil {
			return "", err
		}
		e := Event{
			ID: newID(), Type: Forked, Time: now.UTC().Truncate(time.Millisecond), Reason: reason,
			Fork: &ForkedTrees{
				OldOrigin: old, NewOrigin: next.Origin(), OldSize: signed.N, OldRoot: signed.Hash.String(),
				Size: tree.N, Root: tree.Hash.String(),
			},
		}
		if _, err := log.Fork(ctx, next.Origin(), e); err != nil {
			return "", err
		}
	}
	for _, name := range []string{"anchor", "log.vkey", "log.key"} {
		if err := setAside(path(name), next.Origin()); err != nil {
			return "", err
		}
	}
	if err := os.Rename(path("log.key.new"), path("log.key")); err != nil {
		return "", err
	}
	_, err = OpenKey(dir, next.Origin(), false) // writes the verifier
	return next.Origin(), err
}

// setAside renames a file of the old log after its origin, which it says itself.
// A file that is not there, or is the new log's, is left alone.
func setAside(path, origin string) error {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	old, _, _ := strings.Cut(string(text), "\n") // an anchor's first line
	if fields := strings.Split(old, "+"); len(fields) >= 5 && fields[0] == "PRIVATE" {
		old = fields[2]
	} else {
		old = fields[0] // a verifier's name
	}
	if old == origin {
		return nil
	}
	return os.Rename(path, path+"."+strings.NewReplacer("/", "_", ":", "_").Replace(old))
}

// nextKey reads the key of a fork that was begun, or makes it.
func nextKey(path string) (*Key, error) {
	skey, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		text, _, err := note.GenerateKey(rand.Reader, NewOrigin())
		if err != nil {
			return nil, fmt.Errorf("make log key: %w", err)
		}
		if err := WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
			return nil, err
		}
		return parseKey(text)
	}
	if err != nil {
		return nil, err
	}
	return parseKey(strings.TrimSpace(string(skey)))
}

// forkable returns the tree that was signed last, if the log does not contain it
// or can be signed no more.
func forkable(ctx context.Context, dir string, log Forker, origin string) (tlog.Tree, error) {
	anchor, err := os.ReadFile(filepath.Join(dir, "anchor"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return tlog.Tree{}, err
	}
	var signed tlog.Tree
	if c, err := taglog.Parse(anchor); err == nil {
		signed = c.Tree
	}
	key, err := OpenKey(dir, "", false)
	if errors.Is(err, fs.ErrNotExist) {
		return signed, nil
	}
	if err != nil || key.Origin() != origin {
		return signed, err
	}
	err = Intact(ctx, log, key, filepath.Join(dir, "anchor"))
	if err == nil {
		return signed, ErrNoFork
	}
	if errors.Is(err, ErrRollback) {
		return signed, nil
	}
	return signed, err
}
