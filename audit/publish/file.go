package publish

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"tidemark/audit"
)

// A File always holds the newest checkpoint. It is replaced whole, and never by
// one of the same log that has fewer entries or another history: what it holds
// then is the proof that the log was taken back.
type File struct {
	Path string

	// Follows checks that the log contains what a checkpoint says that it signed
	// before. Required.
	Follows func(ctx context.Context, before []byte) error
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
	if err := f.Follows(ctx, before); err != nil {
		return fmt.Errorf("%s is left as it is: %w", f.Path, err)
	}
	return audit.WriteFile(f.Path, signed.Note, 0o644)
}
