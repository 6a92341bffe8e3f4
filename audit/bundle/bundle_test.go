package bundle_test

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/bundle"
	"tidemark/audit/sqlite"
	"tidemark/audit/taglog"
)

var update = flag.Bool("update", false, "write the golden bundles")

var noon = time.Date(2026, 5, 3, 12, 0, 0, 0, time.UTC)

// makeKey is the key that a letter stands for.
func makeKey(origin string, letter byte) audit.Key {
	seed := bytes.Repeat([]byte{letter}, ed25519.SeedSize)
	vkey, err := note.NewEd25519VerifierKey(origin, ed25519.NewKeyFromSeed(seed).Public().(ed25519.PublicKey))
	if err != nil {
		panic(err)
	}
	verifier, err := note.NewVerifier(vkey)
	if err != nil {
		panic(err)
	}
	skey := fmt.Sprintf("PRIVATE+KEY+%s+%08x+%s", origin, verifier.KeyHash(), base64.StdEncoding.EncodeToString(append([]byte{1}, seed...)))
	signer, err := note.NewSigner(skey)
	if err != nil {
		panic(err)
	}
	return audit.Key{Signer: signer, Verifier: verifier, VKey: vkey}
}

var logKey = makeKey("tidemark/test", 'k')

// A memoryLog is a log of which nothing depends on when or where it is made.
type memoryLog struct {
	key    audit.Key
	hashes []tlog.Hash
	leaves [][]byte
}

func (l *memoryLog) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	for i, x := range indexes {
		out[i] = l.hashes[x]
	}
	return out, nil
}

// add appends an event, and returns its index.
func (l *memoryLog) add(e audit.Event) int64 {
	n := int64(len(l.leaves))
	e.Time = noon.Add(time.Duration(n) * time.Hour)
	binary.BigEndian.PutUint64(e.ID[8:], uint64(n))
	leaf, err := e.Leaf()
	if err != nil {
		panic(err)
	}
	hashes, err := tlog.StoredHashes(n, leaf, l)
	if err != nil {
		panic(err)
	}
	l.leaves, l.hashes = append(l.leaves, leaf), append(l.hashes, hashes...)
	return n
}

// see appends what a move of a ref is, served or not.
func (l *memoryLog) see(t audit.Type, ref audit.Ref, old, new, served digest.Digest) int64 {
	e := audit.Event{Type: t, Ref: ref, Policy: audit.Effect{Mode: audit.Observe, Served: served}}
	now := noon.Add(time.Duration(len(l.leaves)) * time.Hour)
	before := now.Add(-time.Minute)
	if e.New = (&audit.Content{Digest: new}); old != "" {
		e.Old = &audit.Content{Digest: old}
		e.Interval = &audit.Interval{NotBefore: &before, NotAfter: now}
	} else {
		e.Interval = &audit.Interval{NotAfter: now}
	}
	return l.add(e)
}

func (l *memoryLog) tree() tlog.Tree {
	n := int64(len(l.leaves))
	root, err := tlog.TreeHash(n, l)
	if err != nil {
		panic(err)
	}
	return tlog.Tree{N: n, Hash: root}
}

func (l *memoryLog) checkpoint() []byte {
	signed, err := taglog.Sign(l.key.Origin(), l.tree(), l.key.Signer)
	if err != nil {
		panic(err)
	}
	return signed
}

// events are those of some refs from an index on.
func (l *memoryLog) events(from int64, refs ...audit.Ref) func(context.Context) iter.Seq2[audit.Entry, error] {
	leaves := l.leaves[from:] // as they are now
	return func(context.Context) iter.Seq2[audit.Entry, error] {
		return func(yield func(audit.Entry, error) bool) {
			for i, leaf := range leaves {
				if e, err := audit.ParseLeaf(leaf); err != nil || slices.Contains(refs, e.Ref) {
					if !yield(audit.Entry{Index: from + int64(i), Leaf: leaf}, err) {
						return
					}
				}
			}
		}
	}
}

// A shelf has content by its digest.
type shelf map[digest.Digest][]byte

func (s shelf) put(b []byte, alg digest.Algorithm) bundle.Blob {
	d := alg.FromBytes(b)
	s[d] = b
	return bundle.Blob{Digest: d, Size: int64(len(b))}
}

// manifest puts a manifest that refers to others, and returns it as it is listed.
func (s shelf) manifest(m any) bundle.Blob {
	b, err := json.Marshal(m)
	if err != nil {
		panic(err)
	}
	return s.put(b, digest.SHA256)
}

func (s shelf) open(_ context.Context, d digest.Digest) (io.ReadCloser, error) {
	b, ok := s[d]
	if !ok {
		return nil, fmt.Errorf("%s: %w", d, fs.ErrNotExist)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func descriptor(mediaType string, b bundle.Blob) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: b.Digest, Size: b.Size}
}

// image makes an OCI manifest of a configuration and layers.
func image(subject *ocispec.Descriptor, config bundle.Blob, layers ...bundle.Blob) ocispec.Manifest {
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: descriptor(ocispec.MediaTypeImageConfig, config), Subject: subject}
	m.SchemaVersion = 2
	for _, l := range layers {
		m.Layers = append(m.Layers, descriptor(ocispec.MediaTypeImageLayer, l))
	}
	return m
}

// describe is what the caller of Read brings along.
func describe(b []byte) (bundle.Description, error) {
	var m struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Subject   *ocispec.Descriptor  `json:"subject"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return bundle.Description{}, err
	}
	d := bundle.Description{Index: m.Manifests != nil}
	refs := append(m.Manifests, m.Layers...)
	if m.Config != nil {
		refs = append(refs, *m.Config)
	}
	for _, r := range refs {
		ref := bundle.Reference{Digest: r.Digest, Size: r.Size}
		if p := r.Platform; p != nil && p.OS != "unknown" {
			ref.Platform = p.OS + "/" + p.Architecture
		}
		d.Refers = append(d.Refers, ref)
	}
	if m.Subject != nil {
		d.Subject = m.Subject.Digest
	}
	return d, nil
}

// A world is a log, the images that it tells of, and what two bundles of them pack.
type world struct {
	log         *memoryLog
	content     shelf
	full, delta bundle.Export

	index, child, config, layer bundle.Blob // of app:1
	signature                   bundle.Blob // about its index
	second, big                 bundle.Blob // app:2, and its layer, by SHA-512
}

var (
	one   = audit.Ref{Upstream: "docker.io", Repository: "library/app", Tag: "1"}
	two   = audit.Ref{Upstream: "docker.io", Repository: "library/app", Tag: "2"}
	other = audit.Ref{Upstream: "docker.io", Repository: "library/other", Tag: "latest"}
)

// newWorld makes it, always the same: app:1, an index whose amd64 half is packed,
// and a signature of it; app:2, a manifest. The delta packs a later app:2.
func newWorld() *world {
	s := make(shelf)
	w := &world{log: &memoryLog{key: logKey}, content: s}
	w.config = s.put([]byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`), digest.SHA256)
	w.layer = s.put([]byte("a layer <&> of app:1"), digest.SHA256)
	w.big = s.put(bytes.Repeat([]byte("x"), 512), digest.SHA512)
	w.child = s.manifest(image(nil, w.config, w.layer))
	foreign := bundle.Blob{Digest: audittest.Digest("arm64, which is not packed"), Size: 7}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		descriptor(ocispec.MediaTypeImageManifest, w.child), descriptor(ocispec.MediaTypeImageManifest, foreign),
	}}
	index.SchemaVersion = 2
	index.Manifests[0].Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	index.Manifests[1].Platform = &ocispec.Platform{OS: "linux", Architecture: "arm64"}
	w.index = s.manifest(index)
	subject := descriptor(ocispec.MediaTypeImageIndex, w.index)
	sig := s.put([]byte("a signature"), digest.SHA256)
	w.signature = s.manifest(image(&subject, w.config, sig))
	w.second = s.manifest(image(nil, w.config, w.big))

	first := audittest.Digest("app:1 as it was first")
	w.log.see(audit.FirstSeen, other, "", audittest.Digest("other"), audittest.Digest("other"))
	w.log.see(audit.FirstSeen, one, "", first, first)
	w.log.add(audit.Event{Type: audit.Snapshot, Snapshot: &audit.Commitment{}})
	w.log.see(audit.Moved, one, first, w.index.Digest, first)
	w.log.see(audit.FirstSeen, two, "", w.second.Digest, w.second.Digest)
	released := w.log.see(audit.Released, one, first, w.index.Digest, w.index.Digest)

	referrer := bundle.Referrer{Repository: "docker.io/library/app", Subject: w.index.Digest, Descriptor: descriptor(ocispec.MediaTypeImageManifest, w.signature)}
	referrer.Descriptor.ArtifactType = "application/vnd.example.signature"
	referrer.Descriptor.Annotations = map[string]string{"b": "<2>", "a": "1"}
	ofOne := bundle.Image{
		Ref: one.String(), Digest: w.index.Digest, MediaType: ocispec.MediaTypeImageIndex, Size: w.index.Size,
		Platforms: []string{"linux/amd64"}, Index: released, FirstSeen: noon, LastConfirmed: noon.Add(time.Hour),
	}
	ofTwo := bundle.Image{
		Ref: two.String(), Digest: w.second.Digest, MediaType: ocispec.MediaTypeImageManifest, Size: w.second.Size,
		Index: 4, FirstSeen: noon, LastConfirmed: noon.Add(time.Hour),
	}
	w.full = bundle.Export{
		Contents: bundle.Contents{
			Images:    []bundle.Image{ofTwo, ofOne},
			Referrers: []bundle.Referrer{referrer},
			Manifests: []bundle.Blob{w.index, w.second, w.child, w.signature},
			Blobs:     []bundle.Blob{w.big, w.layer, sig, w.config},
		},
		Checkpoint: w.log.checkpoint(), VKey: logKey.VKey, Signer: logKey.Signer,
		Events: w.log.events(0, one, two), Hashes: w.log, Open: s.open,
	}
	size := w.log.tree().N

	third := s.put([]byte("a layer of a later app:2"), digest.SHA256)
	later := s.manifest(image(nil, w.config, third))
	ofTwo.Index = w.log.see(audit.Moved, two, w.second.Digest, later.Digest, later.Digest)
	ofTwo.Digest, ofTwo.Size = later.Digest, later.Size
	w.log.see(audit.Moved, other, audittest.Digest("other"), audittest.Digest("other 2"), audittest.Digest("other 2"))
	w.delta = w.full
	w.delta.Checkpoint, w.delta.Events = w.log.checkpoint(), w.log.events(size, one, two)
	w.delta.Contents = bundle.Contents{
		Base:      &bundle.Base{Bundle: "", LogSize: size},
		Images:    []bundle.Image{ofOne, ofTwo},
		Referrers: []bundle.Referrer{referrer},
		Manifests: []bundle.Blob{later}, Blobs: []bundle.Blob{third},
		Omitted: []bundle.Blob{w.signature, w.index, w.child, w.config, w.layer, sig},
	}
	return w
}

// small is as little as a bundle can be that has one of everything in the way of
// bytes: an event with a proof, a manifest, and blobs with and without a PAX header.
func (w *world) small() bundle.Export {
	e := w.full
	e.Contents = bundle.Contents{Images: w.full.Contents.Images[:1], Manifests: []bundle.Blob{w.second}, Blobs: []bundle.Blob{w.big, w.config}}
	e.Events = func(ctx context.Context) iter.Seq2[audit.Entry, error] {
		return func(yield func(audit.Entry, error) bool) { yield(audit.Entry{Index: 4, Leaf: w.log.leaves[4]}, nil) }
	}
	return e
}

// pack writes an export.
func pack(t testing.TB, e bundle.Export) ([]byte, digest.Digest) {
	t.Helper()
	var b bytes.Buffer
	id, err := bundle.Write(t.Context(), &b, e)
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes(), id
}

func trust(keys ...audit.Key) func(string) (note.Verifier, error) {
	return func(vkey string) (note.Verifier, error) {
		for _, k := range keys {
			if k.VKey == vkey {
				return k.Verifier, nil
			}
		}
		return nil, fmt.Errorf("%w: %.100q", errUntrusted, vkey)
	}
}

var errUntrusted = errors.New("not a key that is trusted")

func checks() bundle.Checks {
	return bundle.Checks{Verifier: trust(logKey), Describe: describe}
}

// read reads a bundle that must be refused or not, and returns what it brought.
func read(ctx context.Context, b []byte) (c bundle.Contents, content shelf, entries []audit.Entry, err error) {
	content = make(shelf)
	cs := checks()
	cs.Event = func(e audit.Entry) error { entries = append(entries, e); return nil }
	cs.Content = func(_ context.Context, b bundle.Blob, r io.Reader) error {
		var err error
		content[b.Digest], err = io.ReadAll(r)
		return err
	}
	c, err = bundle.Read(ctx, bytes.NewReader(b), cs)
	return c, content, entries, err
}

// What is packed comes out again as it was: the list, the events, and the content.
// The order in which it is given makes no difference, and the bytes are those of
// the golden files, for bundles outlive a release.
func TestRoundTrip(t *testing.T) {
	w := newWorld()
	full, id := pack(t, w.full)
	w.delta.Contents.Base.Bundle = id
	for _, tt := range []struct {
		name   string
		export bundle.Export
		events []int64
	}{
		{"full", w.full, []int64{1, 3, 4, 5}},
		{"delta", w.delta, []int64{6}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			packed, id := pack(t, tt.export)
			golden := filepath.Join("testdata", tt.name+".tar")
			if *update {
				if err := os.WriteFile(golden, packed, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want, err := os.ReadFile(golden); err != nil || !bytes.Equal(packed, want) {
				t.Errorf("%s is another one: %v", golden, err)
			}

			shuffled := tt.export
			c := &shuffled.Contents
			c.Images, c.Manifests, c.Blobs, c.Omitted = reversed(c.Images), reversed(c.Manifests), reversed(c.Blobs), reversed(c.Omitted)
			for i := range c.Images {
				c.Images[i].FirstSeen = c.Images[i].FirstSeen.In(time.FixedZone("", 3600)).Add(time.Microsecond)
			}
			if again, id2 := pack(t, shuffled); !bytes.Equal(packed, again) || id != id2 {
				t.Error("the same things in another order make another bundle")
			}

			var begun bundle.Contents
			got, content, entries, err := read(t.Context(), packed)
			if err != nil {
				t.Fatal(err)
			}
			if got.ID() != id {
				t.Errorf("the ID of what was read is %s, want %s", got.ID(), id)
			}
			for _, b := range append(got.Manifests, got.Blobs...) {
				if !bytes.Equal(content[b.Digest], w.content[b.Digest]) {
					t.Errorf("%s came out otherwise", b.Digest)
				}
			}
			if len(content) != len(c.Manifests)+len(c.Blobs) {
				t.Errorf("%d pieces of content came out, want %d", len(content), len(c.Manifests)+len(c.Blobs))
			}
			var indexes []int64
			for _, e := range entries {
				indexes = append(indexes, e.Index)
				if !bytes.Equal(e.Leaf, w.log.leaves[e.Index]) {
					t.Errorf("event %d came out as %s", e.Index, e.Leaf)
				}
			}
			if !slices.Equal(indexes, tt.events) {
				t.Errorf("events %v came out, want %v", indexes, tt.events)
			}
			cs := checks()
			cs.Begin = func(c bundle.Contents) error { begun = c; return nil }
			if _, err := bundle.Read(t.Context(), iotest.OneByteReader(bytes.NewReader(packed)), cs); err != nil {
				t.Errorf("byte by byte: %v", err)
			}
			if !reflect.DeepEqual(begun, got) {
				t.Errorf("Begin was told %+v, want %+v", begun, got)
			}
		})
	}
	c, err := bundle.ReadContents(bytes.NewReader(full[:listEnd(t, full)]), trust(logKey))
	if err != nil || c.ID() != id {
		t.Errorf("the list alone is %s, %v; want %s", c.ID(), err, id)
	}
}

func reversed[T any](s []T) []T {
	s = slices.Clone(s)
	slices.Reverse(s)
	return s
}

// listEnd is where the last entry ends that a list needs.
func listEnd(t *testing.T, b []byte) int {
	i := bytes.Index(b, []byte("tidemark/checkpoint\x00"))
	if i < 0 {
		t.Fatal("no checkpoint")
	}
	return i
}

// Others read it: a tar of regular files, an OCI layout whose images are complete
// and named. Stories with skopeo and containerd are in e2e.
func TestOthersReadIt(t *testing.T) {
	w := newWorld()
	packed, _ := pack(t, w.full)
	dir := t.TempDir()
	tr := tar.NewReader(bytes.NewReader(packed))
	var names []string
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.Typeflag != tar.TypeReg || h.Mode != 0o644 || h.Uid+h.Gid != 0 || h.Uname+h.Gname != "" || h.ModTime.Unix() != 0 {
			t.Errorf("%s has the header %+v", h.Name, h)
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err == nil {
			err = os.WriteFile(path, b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"oci-layout", "index.json", "tidemark/contents.json", "tidemark/contents.sig", "tidemark/vkey", "tidemark/checkpoint", "tidemark/events.jsonl"}
	for _, list := range [][]bundle.Blob{w.full.Contents.Manifests, w.full.Contents.Blobs} {
		list = slices.SortedFunc(slices.Values(list), func(a, b bundle.Blob) int { return cmp.Compare(a.Digest, b.Digest) })
		for _, b := range list {
			want = append(want, "blobs/"+strings.Replace(b.Digest.String(), ":", "/", 1))
		}
	}
	if !slices.Equal(names, want) {
		t.Errorf("entries are %q, want %q", names, want)
	}
	ix, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := ix.IndexManifest()
	if err != nil || len(m.Manifests) != 2 || m.Manifests[0].Annotations[ocispec.AnnotationRefName] != one.String() || m.Manifests[1].Annotations["io.containerd.image.name"] != two.String() {
		t.Errorf("the layout has %+v, %v", m, err)
	}
	if err := validate.Index(ix, validate.Fast); err != nil && !strings.Contains(err.Error(), "arm64") {
		t.Log(err) // what is in the layers of the test is no tar
	}
}

// everywhere calls f for every number below n, on all processors.
func everywhere(n int, f func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// refused fails the test unless err says that the bundle is wrong.
func refused(t testing.TB, what string, err error) {
	t.Helper()
	var wrong *bundle.WrongError
	if !errors.As(err, &wrong) && !errors.Is(err, errUntrusted) {
		t.Errorf("%s: %v; want a WrongError", what, err)
	} else if wrong != nil && (wrong.Entry == "" || wrong.What == "") {
		t.Errorf("%s: %v does not say what is wrong where", what, err)
	}
}

// There is no byte in a bundle that could be another one.
func TestEveryFlippedByteIsRefused(t *testing.T) {
	packed, _ := pack(t, newWorld().small())
	if _, err := bundle.Read(t.Context(), bytes.NewReader(packed), checks()); err != nil {
		t.Fatal(err)
	}
	at := func(entry string) int { return bytes.Index(packed, append([]byte(entry), 0)) }
	signed, key, checkpoint, events := at("tidemark/contents.sig"), at("tidemark/vkey"), at("tidemark/checkpoint"), at("tidemark/events.jsonl")
	if signed < 0 || key < signed || checkpoint < key || events < checkpoint {
		t.Fatal("the entries are not where they should be")
	}
	everywhere(len(packed), func(i int) {
		bits := []byte{1 << (i % 8)}
		if i >= signed && i < events && packed[i] != 0 {
			bits = []byte{1, 2, 4, 8, 16, 32, 64, 128} // base64 has room that no hash covers
		}
		b := slices.Clone(packed)
		for _, bit := range bits {
			b[i] ^= bit
			_, err := bundle.Read(context.Background(), bytes.NewReader(b), checks())
			refused(t, fmt.Sprintf("byte %d ^ %d", i, bit), err)
			b[i] ^= bit
		}
	})
}

const block = 512

// A bundle that is cut off anywhere is refused, and is not taken for a failure of
// the disk; one that cannot be read on is not taken for a wrong one.
func TestEveryTruncationIsRefused(t *testing.T) {
	packed, _ := pack(t, newWorld().small())
	everywhere(len(packed), func(i int) {
		_, err := bundle.Read(context.Background(), bytes.NewReader(packed[:i]), checks())
		refused(t, fmt.Sprintf("cut off after %d bytes", i), err)
	})
	broken := errors.New("broken")
	for i := 0; i <= len(packed); i += 97 {
		_, err := bundle.Read(t.Context(), io.MultiReader(bytes.NewReader(packed[:i]), iotest.ErrReader(broken)), checks())
		var wrong *bundle.WrongError
		if !errors.Is(err, broken) || errors.As(err, &wrong) {
			t.Errorf("unreadable after %d bytes: %v", i, err)
		}
	}
	_, err := bundle.Read(t.Context(), io.MultiReader(bytes.NewReader(packed), iotest.ErrReader(broken)), checks())
	if !errors.Is(err, broken) {
		t.Errorf("unreadable at its end: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := bundle.Read(ctx, bytes.NewReader(packed), checks()); !errors.Is(err, context.Canceled) {
		t.Errorf("after a cancel: %v", err)
	}
}

// What the checks say is what Read says, and no more is asked after it.
func TestChecksDecide(t *testing.T) {
	packed, _ := pack(t, newWorld().full)
	no := errors.New("no")
	for name, set := range map[string]func(*bundle.Checks){
		"verifier": func(c *bundle.Checks) { c.Verifier = func(string) (note.Verifier, error) { return nil, no } },
		"begin":    func(c *bundle.Checks) { c.Begin = func(bundle.Contents) error { return no } },
		"event":    func(c *bundle.Checks) { c.Event = func(audit.Entry) error { return no } },
		"content":  func(c *bundle.Checks) { c.Content = func(context.Context, bundle.Blob, io.Reader) error { return no } },
		"content, at end": func(c *bundle.Checks) {
			c.Content = func(_ context.Context, _ bundle.Blob, r io.Reader) error { io.Copy(io.Discard, r); return no }
		},
	} {
		cs := checks()
		set(&cs)
		_, err := bundle.Read(t.Context(), bytes.NewReader(packed), cs)
		var wrong *bundle.WrongError
		if !errors.Is(err, no) || errors.As(err, &wrong) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cs := checks()
	cs.Describe = func([]byte) (bundle.Description, error) { return bundle.Description{}, no }
	_, err := bundle.Read(t.Context(), bytes.NewReader(packed), cs)
	refused(t, "what is no manifest", err)

	// Content that is there already need not be read, and is checked nevertheless.
	cs = checks()
	cs.Content = func(context.Context, bundle.Blob, io.Reader) error { return nil }
	if _, err := bundle.Read(t.Context(), bytes.NewReader(packed), cs); err != nil {
		t.Error(err)
	}
	i := bytes.Index(packed, []byte("a layer <&>"))
	packed[i] ^= 1
	_, err = bundle.Read(t.Context(), bytes.NewReader(packed), cs)
	refused(t, "wrong content that is not wanted", err)
}

// Whoever takes in content gets the last bytes only if all are right.
func TestWrongContentIsNeverComplete(t *testing.T) {
	w := newWorld()
	packed, _ := pack(t, w.full)
	packed[bytes.Index(packed, []byte("a layer <&>"))] ^= 1
	cs := checks()
	cs.Content = func(_ context.Context, b bundle.Blob, r io.Reader) error {
		if n, err := io.ReadFull(r, make([]byte, b.Size)); b.Digest == w.layer.Digest && (int64(n) == b.Size || err == nil) {
			t.Errorf("%d of %d bytes were handed out, %v", n, b.Size, err)
		}
		return nil
	}
	_, err := bundle.Read(t.Context(), bytes.NewReader(packed), cs)
	refused(t, "a layer that is wrong", err)
}

// What is not what the list says is not packed: the error names it, and what was
// written is no bundle.
func TestWriteRefuses(t *testing.T) {
	read := func(e *bundle.Export, d digest.Digest, content string, err error) {
		open := e.Open
		e.Open = func(ctx context.Context, asked digest.Digest) (io.ReadCloser, error) {
			if asked == d {
				return io.NopCloser(io.MultiReader(strings.NewReader(content), iotest.ErrReader(cmp.Or(err, io.EOF)))), nil
			}
			return open(ctx, asked)
		}
	}
	broken := errors.New("broken")
	w := newWorld()
	layer := string(w.content[w.layer.Digest])
	for _, tt := range []struct {
		name, want string
		change     func(*bundle.Export)
	}{
		{"content is missing", w.layer.Digest.Encoded(), func(e *bundle.Export) {
			e.Open = func(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
				if d == w.layer.Digest {
					return nil, fs.ErrNotExist
				}
				return w.content.open(ctx, d)
			}
		}},
		{"content is wrong", w.layer.Digest.Encoded() + ": its 20 bytes hash to", func(e *bundle.Export) { read(e, w.layer.Digest, "A"+layer[1:], nil) }},
		{"content is short", w.layer.Digest.Encoded() + ": ends after 19", func(e *bundle.Export) { read(e, w.layer.Digest, layer[1:], nil) }},
		{"content is long", w.layer.Digest.Encoded() + ": has more than 20", func(e *bundle.Export) { read(e, w.layer.Digest, layer+"x", nil) }},
		{"content cannot be read", w.layer.Digest.Encoded() + ": broken", func(e *bundle.Export) { read(e, w.layer.Digest, layer[1:], broken) }},
		{"content cannot be read to its end", w.layer.Digest.Encoded() + ": broken", func(e *bundle.Export) { read(e, w.layer.Digest, layer, broken) }},
		{"another signer", "contents.sig", func(e *bundle.Export) { e.Signer = makeKey("tidemark/test", 'x').Signer }},
		{"another key", "checkpoint", func(e *bundle.Export) { e.VKey = makeKey("tidemark/test", 'x').VKey }},
		{"no key", "vkey", func(e *bundle.Export) { e.VKey = "" }},
		{"no checkpoint", "checkpoint", func(e *bundle.Export) { e.Checkpoint = nil }},
		{"events too few", "its last event in the bundle is 3, the list says 5", func(e *bundle.Export) {
			e.Events = func(ctx context.Context) iter.Seq2[audit.Entry, error] {
				return func(yield func(audit.Entry, error) bool) {
					for entry, err := range w.log.events(0, one, two)(ctx) {
						if entry.Index < 5 && !yield(entry, err) {
							return
						}
					}
				}
			}
		}},
		{"events of others", "event 0 is about", func(e *bundle.Export) { e.Events = w.log.events(0, one, two, other) }},
		{"events cannot be read", "broken", func(e *bundle.Export) {
			e.Events = func(context.Context) iter.Seq2[audit.Entry, error] {
				return func(yield func(audit.Entry, error) bool) { yield(audit.Entry{}, broken) }
			}
		}},
		{"events change", "changed while", func(e *bundle.Export) {
			calls, events := 0, e.Events
			e.Contents.Base = &bundle.Base{LogSize: 6}
			e.Events = func(ctx context.Context) iter.Seq2[audit.Entry, error] {
				if calls++; calls == 1 {
					return events(ctx)
				}
				return func(func(audit.Entry, error) bool) {}
			}
		}},
		{"another log's hashes", "event 1 is not in the tree", func(e *bundle.Export) {
			e.Hashes = tlog.HashReaderFunc(func(x []int64) ([]tlog.Hash, error) { return make([]tlog.Hash, len(x)), nil })
		}},
		{"an image that is not packed", w.second.Digest.String(), func(e *bundle.Export) { e.Contents.Manifests = []bundle.Blob{w.index, w.child, w.signature} }},
		{"content twice", w.config.Digest.String() + " is listed twice", func(e *bundle.Export) { e.Contents.Blobs = append(slices.Clone(e.Contents.Blobs), w.config) }},
		{"a ref that is none", "is not upstream/repository:tag", func(e *bundle.Export) { e.Contents.Images[0].Ref = "nginx" }},
		{"a ref that is no text", "one form", func(e *bundle.Export) {
			e.Contents.Images = append(e.Contents.Images, e.Contents.Images[0])
			e.Contents.Images[2].Ref = "docker.io/a\xff:1"
			e.Contents.Base, e.Contents.Images[2].Index = &bundle.Base{LogSize: 6}, 1
		}},
	} {
		w := newWorld()
		tt.change(&w.full)
		var b bytes.Buffer
		if _, err := bundle.Write(t.Context(), &b, w.full); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want one that says %q", tt.name, err, tt.want)
		}
		_, err := bundle.Read(t.Context(), &b, checks())
		refused(t, tt.name, err)
	}
	var full limited
	if _, err := bundle.Write(t.Context(), &full, w.full); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("a full disk: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := bundle.Write(ctx, io.Discard, w.full); !errors.Is(err, context.Canceled) {
		t.Errorf("after a cancel: %v", err)
	}
}

// limited is full.
type limited struct{}

func (*limited) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// A zeroReader yields zeros.
type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Neither side holds content in memory: packing and reading 256 MiB takes no more
// than the buffers.
func TestMemoryDoesNotGrowWithContent(t *testing.T) {
	const size = 256 << 20
	w := newWorld()
	digester := digest.SHA256.Digester()
	if _, err := io.CopyN(digester.Hash(), zeroReader{}, size); err != nil {
		t.Fatal(err)
	}
	d := digester.Digest()
	w.full.Contents.Blobs = append(w.full.Contents.Blobs, bundle.Blob{Digest: d, Size: size})
	w.full.Open = func(ctx context.Context, asked digest.Digest) (io.ReadCloser, error) {
		if asked == d {
			return io.NopCloser(io.LimitReader(zeroReader{}, size)), nil
		}
		return w.content.open(ctx, asked)
	}
	pr, pw := io.Pipe()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	go func() {
		_, err := bundle.Write(context.Background(), pw, w.full)
		pw.CloseWithError(err)
	}()
	taken := int64(0)
	cs := checks()
	cs.Content = func(_ context.Context, b bundle.Blob, r io.Reader) (err error) {
		if b.Digest == d {
			taken, err = io.Copy(struct{ io.Writer }{io.Discard}, r)
		}
		return err
	}
	if _, err := bundle.Read(t.Context(), pr, cs); err != nil || taken != size {
		t.Fatalf("%d bytes were taken in, %v", taken, err)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 8<<20 {
		t.Errorf("%d bytes were allocated in all", got)
	}
}

// What the log of a store says is packed and read: events as the ledger writes
// them, held and released among them.
func TestEventsOfALedger(t *testing.T) {
	store, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "audit.db"), logKey.Origin())
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	content := make(shelf)
	config := content.put([]byte("{}"), digest.SHA256)
	var manifests []bundle.Blob
	see := func(ref audit.Ref, i int) audit.State {
		layer := content.put(fmt.Append(nil, ref, i), digest.SHA256)
		m := content.manifest(image(nil, config, layer))
		manifests = append(manifests, m)
		st, err := audittest.Advance(t.Context(), store, ref, nil, audit.Observation{Digest: m.Digest, MediaType: ocispec.MediaTypeImageManifest, Size: m.Size}, noon.Add(time.Duration(i)*time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	var e bundle.Export
	sizeOf := func(d digest.Digest) bundle.Blob { return bundle.Blob{Digest: d, Size: int64(len(content[d]))} }
	for i := range 30 {
		for _, ref := range []audit.Ref{one, two, other} {
			st := see(ref, i)
			if i == 29 {
				b := sizeOf(st.Served)
				e.Contents.Images = append(e.Contents.Images, bundle.Image{Ref: ref.String(), Digest: b.Digest, Size: b.Size, MediaType: ocispec.MediaTypeImageManifest, Index: st.Index, FirstSeen: noon, LastConfirmed: noon})
				e.Contents.Manifests = append(e.Contents.Manifests, b)
				e.Contents.Blobs = append(e.Contents.Blobs, sizeOf(digest.FromBytes(fmt.Append(nil, ref, i))))
			}
		}
	}
	e.Contents.Images = e.Contents.Images[:2]
	e.Contents.Blobs = append(e.Contents.Blobs, config)
	tree, err := store.Tree(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if e.Checkpoint, err = taglog.Sign(logKey.Origin(), tree, logKey.Signer); err != nil {
		t.Fatal(err)
	}
	e.VKey, e.Signer, e.Hashes, e.Open = logKey.VKey, logKey.Signer, store, content.open
	e.Events = func(ctx context.Context) iter.Seq2[audit.Entry, error] {
		return func(yield func(audit.Entry, error) bool) {
			all, err := store.Events(ctx, audit.EventQuery{})
			if err != nil {
				yield(audit.Entry{}, err)
				return
			}
			for _, entry := range all {
				if ev, err := audit.ParseLeaf(entry.Leaf); (err != nil || ev.Ref != other) && !yield(entry, err) {
					return
				}
			}
		}
	}
	packed, id := pack(t, e)
	c, err := bundle.Read(t.Context(), bytes.NewReader(packed), checks())
	if err != nil || c.ID() != id || c.Events.Count != 60 {
		t.Errorf("%s with %d events, %v; want %s with 60", c.ID(), c.Events.Count, err, id)
	}
}
