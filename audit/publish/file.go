package publish

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/taglog"
)

// A File always holds the newest checkpoint. It is replaced whole, and never by
// one of the same log that has fewer entries or another history: what it holds
// then is the proof that the log was taken back.
type File struct {
	Path string

	// Contains checks that the log contains a tree that it signed before.
	Contains func(context.Context, tlog.Tree) error
}

// Name implements Sink.
func (f File) Name() string { return "file " + f.Path }

// ID implements Sink.
func (f File) ID() string { return f.Name() }

// Put implements Sink.
func (f File) Put(ctx context.Context, signed audit.Signed) error {
	before, err := os.ReadFile(f.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if had, err := taglog.Parse(before); err == nil {
		has, err := taglog.Parse(signed.Note)
		if err != nil {
			return err
		}
		if had.Origin == has.Origin {
			if err := f.Contains(ctx, had.Tree); err != nil {
				return fmt.Errorf("%s has a checkpoint of %d entries of this log and is left as it is: %w", f.Path, had.N, err)
			}
		}
	}
	return audit.WriteFile(f.Path, signed.Note, 0o644)
}
