package publish

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"filippo.io/torchwood"

	"tidemark/audit"
)

// A File always holds the newest checkpoint. It is replaced whole, and never by
// one of the same log that has fewer entries.
type File struct{ Path string }

// Name implements Sink.
func (f File) Name() string { return "file " + f.Path }

// ID implements Sink.
func (f File) ID() string { return f.Name() }

// Put implements Sink.
func (f File) Put(_ context.Context, signed audit.Signed) error {
	before, err := os.ReadFile(f.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	had, err := parse(before)
	if err == nil {
		has, err := parse(signed.Note)
		if err != nil {
			return err
		}
		if had.Origin == has.Origin && had.N > has.N {
			return fmt.Errorf("%s has a checkpoint of %d entries of this log, more than the %d it has now", f.Path, had.N, has.N)
		}
	}
	return audit.WriteFile(f.Path, signed.Note, 0o644)
}

// parse reads a signed checkpoint without looking at its signature.
func parse(signed []byte) (torchwood.Checkpoint, error) {
	text, _, ok := strings.Cut(string(signed), "\n\n")
	if !ok {
		return torchwood.Checkpoint{}, errors.New("not a signed checkpoint")
	}
	return torchwood.ParseCheckpoint(text + "\n")
}
