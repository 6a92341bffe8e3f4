// Package disk keeps content in a directory, by digest. The directory is the
// database: a name is a digest, a size a size, and a modification time the last
// use. blobs/ has the layout of an OCI image layout's blobs folder.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"tidemark/cache"
)

// A Store is a cache.Store in a directory of the local file system. It must be
// the only one that writes there; that is the owner's to ensure.
//
// Content becomes visible by a rename after an fsync, so a name never stands
// for half of its content. The directory itself is synced only by Sync: otherwise a
// rename that a power cut undoes is a miss, and the bytes are still in partial/.
type Store struct {
	blobs, partial string
}

// algorithms are the folders below blobs/.
var algorithms = []digest.Algorithm{digest.SHA256, digest.SHA512}

// Open returns the store in dir, and makes its folders if they are not there.
func Open(dir string) (*Store, error) {
	s := &Store{filepath.Join(dir, "blobs"), filepath.Join(dir, "partial")}
	for _, a := range algorithms {
		if err := os.MkdirAll(filepath.Join(s.blobs, a.String()), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(s.partial, 0o755); err != nil {
		return nil, err
	}
	return s, nil
}

// check refuses what is no digest: names of files are made of it.
func check(dgst digest.Digest) error {
	if err := dgst.Validate(); err != nil {
		return fmt.Errorf("%.100q: %w", string(dgst), err)
	}
	if !slices.Contains(algorithms, dgst.Algorithm()) {
		return fmt.Errorf("%s: %w", dgst, digest.ErrDigestUnsupported)
	}
	return nil
}

func (s *Store) path(dgst digest.Digest) string {
	return filepath.Join(s.blobs, dgst.Algorithm().String(), dgst.Encoded())
}

func (s *Store) partialPath(dgst digest.Digest) string {
	return filepath.Join(s.partial, dgst.Algorithm().String()+"-"+dgst.Encoded())
}

// Open implements cache.Shelf. The file is an *os.File.
func (s *Store) Open(dgst digest.Digest) (cache.File, cache.Entry, error) {
	if err := check(dgst); err != nil {
		return nil, cache.Entry{}, err
	}
	f, err := os.Open(s.path(dgst))
	if err != nil {
		return nil, cache.Entry{}, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file", f.Name())
	}
	if err != nil {
		f.Close()
		return nil, cache.Entry{}, err
	}
	return f, cache.Entry{Digest: dgst, Size: info.Size(), Used: info.ModTime()}, nil
}

// Begin implements cache.Shelf.
func (s *Store) Begin(dgst digest.Digest) (cache.Partial, error) {
	if err := check(dgst); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(s.partialPath(dgst), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	n, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &partial{f: f, n: n, path: f.Name(), final: s.path(dgst)}, nil
}

// Touch implements cache.Keeper.
func (s *Store) Touch(dgst digest.Digest, used time.Time) error {
	if err := check(dgst); err != nil {
		return err
	}
	err := os.Chtimes(s.path(dgst), time.Time{}, used)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Remove implements cache.Keeper.
func (s *Store) Remove(e cache.Entry) error {
	if err := check(e.Digest); err != nil {
		return err
	}
	path := s.path(e.Digest)
	if e.Partial {
		path = s.partialPath(e.Digest)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// walkBatch is how many names are read of a directory at once.
const walkBatch = 1024

// Walk implements cache.Keeper. It reads names, sizes and times, no content.
func (s *Store) Walk(ctx context.Context) iter.Seq2[cache.Entry, error] {
	return func(yield func(cache.Entry, error) bool) {
		for _, a := range algorithms {
			dir := filepath.Join(s.blobs, a.String())
			parse := func(name string) (digest.Digest, bool) { return parseDigest(a.String(), name) }
			if !walk(ctx, dir, false, parse, yield) {
				return
			}
		}
		walk(ctx, s.partial, true, func(name string) (digest.Digest, bool) {
			algorithm, encoded, ok := strings.Cut(name, "-")
			if !ok {
				return "", false
			}
			return parseDigest(algorithm, encoded)
		}, yield)
	}
}

func parseDigest(algorithm, encoded string) (digest.Digest, bool) {
	d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded)
	return d, d.Validate() == nil
}

// walk yields the files of dir whose names are digests, and tells whether to go on.
func walk(ctx context.Context, dir string, partial bool, parse func(string) (digest.Digest, bool), yield func(cache.Entry, error) bool) bool {
	d, err := os.Open(dir)
	if err != nil {
		yield(cache.Entry{}, err)
		return false
	}
	defer d.Close()
	for {
		if err := ctx.Err(); err != nil {
			yield(cache.Entry{}, err)
			return false
		}
		entries, err := d.ReadDir(walkBatch)
		for _, e := range entries {
			dgst, ok := parse(e.Name())
			if !ok || !e.Type().IsRegular() {
				continue
			}
			info, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				continue // removed meanwhile
			}
			if err == nil && !yield(cache.Entry{Digest: dgst, Size: info.Size(), Used: info.ModTime(), Partial: partial}, nil) ||
				err != nil && !yield(cache.Entry{}, err) {
				return false
			}
		}
		if err == io.EOF {
			return true
		}
		if err != nil {
			yield(cache.Entry{}, err)
			return false
		}
	}
}

// Free implements cache.Keeper.
func (s *Store) Free() (int64, error) {
	_, free, err := Space(s.blobs)
	return free, err
}

// Sync implements cache.Store.
func (s *Store) Sync() error {
	for _, a := range algorithms {
		if err := syncFolder(filepath.Join(s.blobs, a.String())); err != nil {
			return err
		}
	}
	return nil
}

// A partial is a file that grows in partial/ and ends in blobs/. f is only
// written by its owner; path changes under mu, for readers open it by name to
// have a position of their own.
type partial struct {
	f     *os.File
	n     int64
	final string

	mu   sync.Mutex
	path string
}

func (p *partial) Size() int64 { return p.n }

func (p *partial) Write(b []byte) (int, error) {
	n, err := p.f.Write(b)
	p.n += int64(n)
	return n, err
}

func (p *partial) Open() (cache.File, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return os.Open(p.path)
}

func (p *partial) Reset() error {
	p.n = 0
	if err := p.f.Truncate(0); err != nil {
		return err
	}
	_, err := p.f.Seek(0, io.SeekStart)
	return err
}

func (p *partial) Sync() error { return p.f.Sync() }

func (p *partial) Commit() error {
	err := p.f.Sync()
	if cerr := p.f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return errors.Join(err, os.Remove(p.path)) // what could not be synced cannot be trusted
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := os.Rename(p.path, p.final); err != nil {
		return err
	}
	p.path = p.final
	return nil
}

func (p *partial) Keep() error {
	if p.n == 0 {
		return p.Discard()
	}
	return p.f.Close()
}

func (p *partial) Discard() error {
	err := p.f.Close()
	if rerr := os.Remove(p.path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}
