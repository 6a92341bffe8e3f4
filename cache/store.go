package cache

import (
	"context"
	"io"
	"iter"
	"time"

	"github.com/opencontainers/go-digest"
)

// A Store keeps content by its digest. It is shared by every goroutine of a
// process, and belongs to one process at a time. Nothing else has to be
// consistent with it: a Cache is rebuilt from what Walk finds. Package
// cachetest holds what every implementation must do.
type Store interface {
	Shelf
	Keeper

	// Sync makes what Commit made visible stay visible after a power cut. It is for
	// content that cannot be fetched again. After an error it can be called again.
	Sync() error
}

// A Shelf is the side of a Store that a pull uses.
type Shelf interface {
	// Open returns the whole content of dgst, as it was committed. Absent
	// content is fs.ErrNotExist. What is removed while it is open stays readable.
	Open(dgst digest.Digest) (File, Entry, error)

	// Begin returns the unfinished content of dgst, with the bytes that an
	// earlier attempt left, perhaps of an earlier process. The caller makes
	// sure that no digest is begun twice at a time.
	Begin(dgst digest.Digest) (Partial, error)
}

// A Keeper is the side of a Store that keeps within bounds.
type Keeper interface {
	// Walk calls yield for all committed content and, with Entry.Partial set,
	// for all unfinished content, in no order. What is neither is passed over,
	// never an error; an error means that the walk is incomplete.
	Walk(ctx context.Context) iter.Seq2[Entry, error]

	// Touch records that dgst was used. Content that is absent is no error.
	Touch(dgst digest.Digest, used time.Time) error

	// Remove forgets the content that e tells of. Absent content is no error.
	Remove(e Entry) error

	// Free is the space in bytes that is left to write to.
	Free() (int64, error)
}

// An Entry tells of content in a Store.
type Entry struct {
	Digest  digest.Digest
	Size    int64     // bytes
	Used    time.Time // as recorded by the last Touch, or when it was committed
	Partial bool      // unfinished
}

// A File is content opened for reading. If it is an *os.File, complete content
// reaches a plain TCP connection without passing through this process.
type File = io.ReadSeekCloser

// A Partial is content that is still arriving. Its owner writes; readers that
// it opens see what is written. It ends with exactly one of Commit, Keep and
// Discard, whether that fails or not; readers stay usable after that.
type Partial interface {
	// Size is the number of bytes that are here.
	Size() int64

	// Write appends. After an error, Size counts what can still be read.
	io.Writer

	// Open returns a reader of what was written so far and will be.
	Open() (File, error)

	// Reset forgets all bytes.
	Reset() error

	// Sync makes the bytes that are here survive a power cut, unfinished. After an
	// error they cannot be trusted.
	Sync() error

	// Commit makes the content durable and then visible under its digest. After
	// a crash it is there whole or not at all. When Commit returns an error the
	// content may be there nevertheless.
	Commit() error

	// Keep leaves the bytes for a later Begin.
	Keep() error

	// Discard removes the bytes.
	Discard() error
}
