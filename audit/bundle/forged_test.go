package bundle_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/bundle"
	"tidemark/audit/taglog"
)

// A forgery is a bundle of which everything is signed as it is: what a holder of the
// key could make that does not use Write.
type forgery struct {
	list       bundle.Contents // of which pack fills in what follows from the rest
	lines      [][]byte
	checkpoint []byte
	key        audit.Key
	content    shelf

	last      func(*bundle.Contents)                      // changes the list when pack has filled it in
	text      func(list []byte) []byte                    // what contents.json is instead
	index     func(index []byte) []byte                   // what index.json is instead
	signature func(list, signature []byte) (other []byte) // what contents.sig is instead
}

// compact encodes v as the entries of a bundle are.
func compact(t testing.TB, v any) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// eventLine is an event of a log as a bundle has it, with its proof for a tree of size.
func (l *memoryLog) eventLine(t testing.TB, size, index int64) []byte {
	t.Helper()
	proof, err := tlog.ProveRecord(size, index, l)
	if err != nil {
		t.Fatal(err)
	}
	return asLine(t, index, string(l.leaves[index]), proof)
}

func asLine(t testing.TB, index int64, leaf string, proof tlog.RecordProof) []byte {
	t.Helper()
	return compact(t, struct {
		Index int64            `json:"index"`
		Leaf  string           `json:"leaf"`
		Proof tlog.RecordProof `json:"proof"`
	}{index, leaf, proof})
}

// forge takes a bundle apart.
func forge(t testing.TB, w *world, e bundle.Export) *forgery {
	t.Helper()
	packed, _ := pack(t, e)
	c, _, entries, err := read(t.Context(), packed)
	if err != nil {
		t.Fatal(err)
	}
	f := &forgery{list: c, checkpoint: e.Checkpoint, key: logKey, content: maps.Clone(w.content)}
	for _, e := range entries {
		f.lines = append(f.lines, w.log.eventLine(t, c.LogSize, e.Index))
	}
	if again := f.pack(t); !bytes.Equal(again, packed) {
		t.Fatal("a forgery without changes is another bundle")
	}
	return f
}

// signNote signs what is signed of a list.
func signNote(t testing.TB, list []byte, key audit.Key) []byte {
	t.Helper()
	signed, err := note.Sign(&note.Note{Text: "tidemark.dev/bundle/v1\n" + key.Origin() + "\n" + digest.FromBytes(list).String() + "\n"}, key.Signer)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func (f *forgery) pack(t testing.TB) []byte {
	t.Helper()
	events := bytes.Join(f.lines, nil)
	c := f.list
	c.Checkpoint = bundle.Blob{Digest: digest.FromBytes(f.checkpoint), Size: int64(len(f.checkpoint))}
	c.Events = bundle.Events{Digest: digest.FromBytes(events), Size: int64(len(events)), Count: int64(len(f.lines))}
	for _, blobs := range [][]bundle.Blob{c.Manifests, c.Blobs, c.Omitted} {
		slices.SortFunc(blobs, func(a, b bundle.Blob) int { return cmp.Compare(a.Digest, b.Digest) })
	}
	if f.last != nil {
		f.last(&c)
	}
	list := bytes.TrimSuffix(compact(t, c), []byte("\n"))
	if f.text != nil {
		list = f.text(list)
	}
	signature, index := signNote(t, list, f.key), c.Index()
	if f.signature != nil {
		signature = f.signature(list, signature)
	}
	if f.index != nil {
		index = f.index(index)
	}
	entries := []entry{
		file("oci-layout", `{"imageLayoutVersion":"1.0.0"}`),
		file("index.json", string(index)),
		file("tidemark/contents.json", string(list)),
		file("tidemark/contents.sig", string(signature)),
		file("tidemark/vkey", f.key.VKey+"\n"),
		file("tidemark/checkpoint", string(f.checkpoint)),
		file("tidemark/events.jsonl", string(events)),
	}
	for _, b := range slices.Concat(c.Manifests, c.Blobs) {
		entries = append(entries, file("blobs/"+strings.Replace(b.Digest.String(), ":", "/", 1), string(f.content[b.Digest])))
	}
	return repack(t, entries)
}

// without is blobs without one.
func without(blobs []bundle.Blob, b bundle.Blob) []bundle.Blob {
	return slices.DeleteFunc(slices.Clone(blobs), func(x bundle.Blob) bool { return x == b })
}

// The signature of the right key does not make a bundle right. Everything else is
// checked as well, and what is wrong is named.
func TestSignedNonsenseIsRefused(t *testing.T) {
	blobOf := func(b bundle.Blob) string { return "blobs/" + strings.Replace(b.Digest.String(), ":", "/", 1) }
	const contents, events, checkpoint, signature = "tidemark/contents.json", "tidemark/events.jsonl", "tidemark/checkpoint", "tidemark/contents.sig"
	imageOne, imageTwo := "image "+one.String(), "image "+two.String()
	w := newWorld()
	size := int64(6) // of the log when w.full was packed
	replace := func(old, new string) func(*forgery) {
		return func(f *forgery) {
			f.text = func(list []byte) []byte {
				if !bytes.Contains(list, []byte(old)) {
					t.Errorf("no %q in the list", old)
				}
				return bytes.Replace(list, []byte(old), []byte(new), 1)
			}
		}
	}
	last := func(change func(*bundle.Contents)) func(*forgery) {
		return func(f *forgery) { f.last = change }
	}
	lines := func(indexes ...int64) func(*forgery) {
		return func(f *forgery) {
			f.lines = nil
			for _, i := range indexes {
				f.lines = append(f.lines, w.log.eventLine(t, f.list.LogSize, i))
			}
		}
	}
	line := func(i int, change func([]byte) []byte) func(*forgery) {
		return func(f *forgery) { f.lines[i] = change(f.lines[i]) }
	}
	proof := func(i int64) tlog.RecordProof {
		p, err := tlog.ProveRecord(size, i, w.log)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	huge := bundle.Blob{Digest: digest.FromString("huge"), Size: 4<<20 + 1}
	absent := digest.FromString("absent")

	for _, tt := range []struct {
		name        string
		export      bundle.Export
		change      func(*forgery)
		where, what string
	}{
		// The form of the list.
		{"another version", w.full, replace(`{"v":1,`, `{"v":2,`), contents, "version 2; this tidemark reads version 1"},
		{"another version that looks otherwise", w.full, func(f *forgery) { f.text = func([]byte) []byte { return []byte(`{"v":9,"all":"new"}`) } }, contents, "version 9"},
		{"no JSON", w.full, func(f *forgery) { f.text = func([]byte) []byte { return []byte("nginx") } }, contents, "invalid"},
		{"nothing", w.full, func(f *forgery) { f.text = func([]byte) []byte { return nil } }, contents, "EOF"},
		{"a key that is unknown", w.full, replace(`{"v":1,`, `{"v":1,"more":1,`), contents, "unknown field"},
		{"a key that is twice there", w.full, replace(`{"v":1,`, `{"v":1,"v":1,`), contents, "one form"},
		{"a key in capitals", w.full, replace(`{"v":1,`, `{"V":1,`), contents, "one form"},
		{"a space", w.full, replace(`{"v":1,`, `{"v": 1,`), contents, "one form"},
		{"null for nothing", w.full, replace(`"omitted":[]`, `"omitted":null`), contents, "one form"},
		{"an escape that is not needed", w.full, replace(`<2>`, `\u003c2>`), contents, "one form"},
		{"a line", w.full, func(f *forgery) { f.text = func(list []byte) []byte { return append(list, '\n') } }, contents, "one form"},
		{"another time zone", w.full, replace(`T12:00:00Z`, `T13:00:00+01:00`), contents, "one form"},
		{"a finer time", w.full, replace(`T12:00:00Z`, `T12:00:00.00001Z`), contents, "one form"},
		{"not sorted", w.full, last(func(c *bundle.Contents) { slices.Reverse(c.Blobs) }), contents, "one form"},
		{"refs not sorted", w.full, last(func(c *bundle.Contents) { slices.Reverse(c.Images) }), contents, "one form"},

		// What the list says of itself.
		{"another log", w.full, last(func(c *bundle.Contents) { c.Origin = "elsewhere" }), contents, `of the log "elsewhere"`},
		{"a smaller log", w.full, last(func(c *bundle.Contents) { c.LogSize = 5 }), contents, "its last event at 5"},
		{"a larger log", w.full, last(func(c *bundle.Contents) { c.LogSize = 7 }), checkpoint, "of 6 entries, the list says 7"},
		{"an index below zero", w.full, last(func(c *bundle.Contents) { c.Images[0].Index = -1 }), contents, "its last event at -1"},
		{"a ref that is none", w.full, last(func(c *bundle.Contents) { c.Images[0].Ref = "app" }), contents, "not upstream/repository:tag"},
		{"a ref twice", w.full, last(func(c *bundle.Contents) { c.Images[1].Ref = c.Images[0].Ref }), contents, "listed twice"},
		{"an image without type", w.full, last(func(c *bundle.Contents) { c.Images[0].MediaType = "" }), contents, "no media type"},
		{"a platform twice", w.full, last(func(c *bundle.Contents) { c.Images[0].Platforms = []string{"linux/amd64", "linux/amd64"} }), contents, "twice"},
		{"a platform without name", w.full, last(func(c *bundle.Contents) { c.Images[0].Platforms = []string{""} }), contents, "without a name"},
		{"a referrer of another repository", w.full, last(func(c *bundle.Contents) { c.Referrers[0].Repository = "docker.io/library/other" }), contents, "of which no image"},
		{"a referrer without type", w.full, last(func(c *bundle.Contents) { c.Referrers[0].Descriptor.MediaType = "" }), contents, "no media type"},
		{"a referrer twice", w.full, last(func(c *bundle.Contents) { c.Referrers = append(c.Referrers, c.Referrers[0]) }), contents, "listed twice"},
		{"a referrer of nothing", w.full, last(func(c *bundle.Contents) { c.Referrers[0].Subject = absent }), "referrer " + w.signature.Digest.String(), "not in the bundle"},
		{"a referrer that is not there", w.full, last(func(c *bundle.Contents) { c.Referrers[0].Descriptor.Digest = absent }), "referrer of docker.io/library/app", "not in the bundle"},
		{"content twice", w.full, last(func(c *bundle.Contents) { c.Blobs = append([]bundle.Blob{c.Blobs[0]}, c.Blobs...) }), contents, "listed twice"},
		{"content as two things", w.full, last(func(c *bundle.Contents) { c.Manifests = slices.Insert(c.Manifests, 0, c.Blobs[0]) }), contents, "listed twice"},
		{"less than nothing", w.full, last(func(c *bundle.Contents) { c.Blobs[0].Size = -1 }), contents, "cannot have -1 bytes"},
		{"events less than nothing", w.full, last(func(c *bundle.Contents) { c.Events.Size = -1 }), contents, "below zero"},
		{"a checkpoint less than nothing", w.full, last(func(c *bundle.Contents) { c.Checkpoint.Size = -1 }), contents, "below zero"},
		{"a manifest too large", w.full, func(f *forgery) { f.list.Manifests = append(f.list.Manifests, huge) }, contents, "cannot have 4194305 bytes"},
		{"a path as a digest", w.full, replace(w.layer.Digest.String(), "sha256:../../../../etc/passwd"), contents, "digest"},
		{"a digest in capitals", w.full, replace(w.config.Digest.Encoded(), strings.ToUpper(w.config.Digest.Encoded())), contents, "digest"},
		{"a digest of another kind", w.full, replace(w.config.Digest.String(), "sha384:"+strings.Repeat("0", 96)), contents, "unsupported"},
		{"events of a digest of another kind", w.full, last(func(c *bundle.Contents) { c.Events.Digest = digest.Digest("sha384:" + strings.Repeat("0", 96)) }), contents, "unsupported"},
		{"an index of something else", w.full, func(f *forgery) {
			f.index = func(b []byte) []byte { return bytes.Replace(b, []byte(`:1"`), []byte(`:9"`), 1) }
		}, "index.json", "is not the index"},

		// Its signature.
		{"signed twice", w.full, func(f *forgery) {
			f.signature = func(list, s []byte) []byte { return append(s, s[bytes.LastIndex(s, []byte("— ")):]...) }
		}, signature, "more than the one signature"},
		{"signed by others too", w.full, func(f *forgery) {
			f.signature = func(list, s []byte) []byte {
				other := signNote(t, list, makeKey("witness", 'w'))
				return append(s, other[bytes.LastIndex(other, []byte("— ")):]...)
			}
		}, signature, "more than the one signature"},
		{"a checkpoint's signature", w.full, func(f *forgery) { f.signature = func(_, _ []byte) []byte { return w.full.Checkpoint } }, signature, "not the signature of this list"},
		{"another list's signature", w.full, func(f *forgery) {
			f.signature = func(_, _ []byte) []byte { return signNote(t, []byte("{}"), logKey) }
		}, signature, "not the signature of this list"},
		{"not signed", w.full, func(f *forgery) { f.signature = func(_, _ []byte) []byte { return []byte("it is right\n") } }, signature, "not signed"},

		// The checkpoint.
		{"a checkpoint by another key", w.full, func(f *forgery) {
			other := makeKey("tidemark/test", 'x')
			var err error
			if f.checkpoint, err = taglog.Sign(other.Origin(), tlog.Tree{N: size}, other.Signer); err != nil {
				t.Fatal(err)
			}
		}, checkpoint, "not signed by the log's key"},
		{"a checkpoint of another tree", w.full, func(f *forgery) {
			var err error
			if f.checkpoint, err = taglog.Sign(logKey.Origin(), tlog.Tree{N: size}, logKey.Signer); err != nil {
				t.Fatal(err)
			}
		}, events, "is not in the tree"},
		{"a later checkpoint", w.full, func(f *forgery) { f.checkpoint = w.delta.Checkpoint }, checkpoint, "of 8 entries, the list says 6"},
		{"a checkpoint that is none", w.full, func(f *forgery) { f.checkpoint = []byte("x") }, checkpoint, "not signed by the log's key"},
		{"a large checkpoint", w.full, func(f *forgery) { f.checkpoint = make([]byte, 64<<10+1) }, checkpoint, "cannot have 65537 bytes"},
		{"another checkpoint than is listed", w.full, last(func(c *bundle.Contents) { c.Checkpoint.Digest = absent }), checkpoint, "hash to"},

		// The events.
		{"without the first event", w.full, lines(3, 4, 5), events, "event 3 breaks the chain of " + one.String()},
		{"without the last event", w.full, lines(1, 3, 4), imageOne, "its last event in the bundle is 3, the list says 5"},
		{"without a ref", w.full, lines(1, 3, 5), imageTwo, "has no event of it"},
		{"only what is no first event", w.full, lines(4, 5), imageOne, "lacks its first event"},
		{"events in another order", w.full, lines(1, 4, 3, 5), events, "event 3 comes after event 4"},
		{"an event twice", w.full, lines(1, 3, 4, 4, 5), events, "event 4 comes after event 4"},
		{"an event of another ref", w.full, lines(0, 1, 3, 4, 5), events, "event 0 is about"},
		{"an event of no ref", w.full, lines(1, 2, 3, 4, 5), events, "event 2 is about"},
		{"an event that is not signed yet", w.full, func(f *forgery) {
			f.lines = append(f.lines, asLine(t, 6, string(w.log.leaves[6]), tlog.RecordProof{}))
		}, events, "event 6 is beyond the 6 entries"},
		{"an index below zero", w.full, func(f *forgery) { f.lines[0] = asLine(t, -1, string(w.log.leaves[1]), proof(1)) }, events, "event -1 comes after"},
		{"a leaf that was changed", w.full, line(0, func(b []byte) []byte { return bytes.Replace(b, []byte("observe"), []byte("Observe"), 1) }), events, "event 1 is not in the tree"},
		{"an event in another place", w.full, func(f *forgery) { f.lines[2] = asLine(t, 4, string(w.log.leaves[5]), proof(5)) }, events, "event 4 is not in the tree"},
		{"no proof", w.full, func(f *forgery) { f.lines[0] = asLine(t, 1, string(w.log.leaves[1]), tlog.RecordProof{}) }, events, "event 1 is not in the tree"},
		{"more proof than is needed", w.full, func(f *forgery) {
			f.lines[0] = asLine(t, 1, string(w.log.leaves[1]), append(proof(1), tlog.Hash{}))
		}, events, "event 1 is not in the tree"},
		{"a space in a line", w.full, line(0, func(b []byte) []byte { return bytes.Replace(b, []byte(":1,"), []byte(": 1,"), 1) }), events, "line 1: is not in the one form"},
		{"more in a line", w.full, line(0, func(b []byte) []byte { return bytes.Replace(b, []byte(":1,"), []byte(`:1,"x":1,`), 1) }), events, "line 1: "},
		{"a line that does not end", w.full, line(3, func(b []byte) []byte { return bytes.TrimSpace(b) }), events, "line 4 has no end"},
		{"a line that ends otherwise", w.full, line(0, func(b []byte) []byte { return append(bytes.TrimSpace(b), '\r', '\n') }), events, "line 1: is not in the one form"},
		{"an empty line", w.full, line(0, func(b []byte) []byte { return append([]byte("\n"), b...) }), events, "line 1: "},
		{"a line without end", w.full, line(0, func(b []byte) []byte { return append(bytes.Repeat([]byte(" "), 256<<10), b...) }), events, "line 1 is longer than"},
		{"a leaf that is no text", w.full, line(0, func(b []byte) []byte { return bytes.Replace(b, []byte("observe"), []byte("\xff"), 1) }), events, "line 1: "},
		{"more events than are listed", w.full, last(func(c *bundle.Contents) { c.Events.Count = 3 }), events, "has 4 events, the list says 3"},
		{"other events than are listed", w.full, last(func(c *bundle.Contents) { c.Events.Digest = absent }), events, "hash to"},
		{"no events, of another digest", w.full, func(f *forgery) {
			f.lines = nil
			f.last = func(c *bundle.Contents) { c.Events.Digest = absent }
		}, events, "hash to"},
		{"a digest that is not served", w.full, last(func(c *bundle.Contents) { c.Images[1].Digest, c.Images[1].Size = w.child.Digest, w.child.Size }), imageTwo, "event 4 says that"},

		// What manifests say.
		{"without a layer", w.full, func(f *forgery) { f.list.Blobs = without(f.list.Blobs, w.layer) }, blobOf(w.child), "needs " + w.layer.Digest.String()},
		{"without a platform", w.full, func(f *forgery) { f.list.Manifests = without(f.list.Manifests, w.child) }, blobOf(w.index), "needs " + w.child.Digest.String()},
		{"without an image", w.full, func(f *forgery) { f.list.Manifests = without(f.list.Manifests, w.second) }, imageTwo, "needs " + w.second.Digest.String()},
		{"a manifest as a blob", w.full, func(f *forgery) {
			f.list.Manifests, f.list.Blobs = without(f.list.Manifests, w.child), append(f.list.Blobs, w.child)
		}, blobOf(w.index), "as a manifest"},
		{"an image of another size", w.full, last(func(c *bundle.Contents) { c.Images[0].Size++ }), imageOne, "bytes, the list says"},
		{"a blob of another size", w.full, last(func(c *bundle.Contents) {
			c.Blobs[slices.Index(c.Blobs, w.layer)].Size++
		}), blobOf(w.child), "bytes, the list says"},
		{"a referrer of another", w.full, last(func(c *bundle.Contents) { c.Referrers[0].Subject = w.child.Digest }), blobOf(w.signature), "is about"},
		{"all platforms, which are not there", w.full, last(func(c *bundle.Contents) { c.Images[0].Platforms = nil }), blobOf(w.index), "needs "},
		{"a platform that there is not", w.full, last(func(c *bundle.Contents) { c.Images[0].Platforms = []string{"plan9/mips"} }), blobOf(w.index), "no manifest for plan9/mips"},
		{"a platform of what has none", w.full, last(func(c *bundle.Contents) { c.Images[1].Platforms = []string{"linux/amd64"} }), blobOf(w.second), "is no index"},
		{"a manifest that is none", w.full, func(f *forgery) {
			f.list.Manifests = append(f.list.Manifests, f.content.put([]byte("x"), digest.SHA256))
		}, "blobs/sha256/" + digest.FromString("x").Encoded(), "invalid"},
		{"an empty blob that is another", w.full, func(f *forgery) { f.list.Blobs = append(f.list.Blobs, bundle.Blob{Digest: absent}) }, "blobs/sha256/" + absent.Encoded(), "its 0 bytes hash to"},

		// Deltas.
		{"omitted, and no base", w.delta, last(func(c *bundle.Contents) { c.Base = nil }), contents, "without a base"},
		{"a base that is larger", w.delta, last(func(c *bundle.Contents) { c.Base.LogSize = 9 }), contents, "its base 9"},
		{"a base below zero", w.delta, last(func(c *bundle.Contents) { c.Base.LogSize = -1 }), contents, "its base -1"},
		{"a base that is none", w.delta, last(func(c *bundle.Contents) { c.Base.Bundle = "sha256:base" }), contents, "base: digest"},
		{"neither there nor omitted", w.delta, func(f *forgery) { f.list.Omitted = without(f.list.Omitted, w.config) }, "", "needs " + w.config.Digest.String()},
		{"omitted and there", w.delta, func(f *forgery) { f.list.Blobs = append(f.list.Blobs, w.config) }, contents, "listed twice"},
		{"a move that is missing", w.delta, lines(), imageTwo, "has no event of it"},
		{"half of what the base has", w.delta, lines(5, 6), imageOne, "the bundle has its event 5, which the base of 6 entries has"},
		{"a move by a base that did not have it", w.delta, last(func(c *bundle.Contents) { c.Base.LogSize = 5 }), imageOne, "has no event of it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := forge(t, w, tt.export)
			tt.change(f)
			_, err := bundle.Read(t.Context(), bytes.NewReader(f.pack(t)), checks())
			var wrong *bundle.WrongError
			if !errors.As(err, &wrong) || tt.where != "" && wrong.Entry != tt.where || !strings.Contains(wrong.What, tt.what) {
				t.Errorf("%v; want a WrongError about %s that says %q", err, tt.where, tt.what)
			}
		})
	}
}

// A bundle that is signed right by a key that is not trusted is not read, whatever
// the key calls itself; and whoever answers with a trusted key to every question does
// not trust more thereby.
func TestOnlyTrustedKeysCount(t *testing.T) {
	w := newWorld()
	other := makeKey(logKey.Origin(), 'x')
	w.log.key = other
	f := forge(t, w, w.full)
	f.key = other
	var err error
	if f.checkpoint, err = taglog.Sign(other.Origin(), tlog.Tree{N: 6, Hash: must(tlog.TreeHash(6, w.log))}, other.Signer); err != nil {
		t.Fatal(err)
	}
	packed := f.pack(t)
	cs := checks()
	cs.Begin = func(bundle.Contents) error { t.Error("the list was believed"); return nil }
	if _, err := bundle.Read(t.Context(), bytes.NewReader(packed), cs); !errors.Is(err, errUntrusted) {
		t.Errorf("another key of the same name: %v", err)
	}
	cs.Verifier = func(string) (note.Verifier, error) { return logKey.Verifier, nil }
	_, err = bundle.Read(t.Context(), bytes.NewReader(packed), cs)
	refused(t, "another key of the same name, and the trusted one for every answer", err)
	if _, err := bundle.ReadContents(bytes.NewReader(packed), cs.Verifier); err == nil {
		t.Error("the list alone was believed")
	}
	cs = checks()
	cs.Verifier = trust(other)
	if _, err := bundle.Read(t.Context(), bytes.NewReader(packed), cs); err != nil {
		t.Errorf("to who trusts that key: %v", err)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// A delta is taken in where its base is, with which it is whole. Elsewhere it is
// refused with what Begin says, before anything that is in it was handed out.
func TestDeltaNeedsItsBase(t *testing.T) {
	w := newWorld()
	full, id := pack(t, w.full)
	w.delta.Contents.Base.Bundle = id
	delta, _ := pack(t, w.delta)

	here := make(shelf)
	noBase := errors.New("the base is not here")
	var handed []string
	cs := checks()
	cs.Begin = func(c bundle.Contents) error {
		for _, b := range c.Omitted {
			if int64(len(here[b.Digest])) != b.Size {
				return noBase
			}
		}
		if c.Base != nil && c.Base.Bundle != id {
			t.Errorf("the base is %s, want %s", c.Base.Bundle, id)
		}
		return nil
	}
	cs.Event = func(e audit.Entry) error { handed = append(handed, "an event"); return nil }
	cs.Content = func(_ context.Context, b bundle.Blob, r io.Reader) (err error) {
		handed = append(handed, b.Digest.String())
		here[b.Digest], err = io.ReadAll(r)
		return err
	}
	if _, err := bundle.Read(t.Context(), bytes.NewReader(delta), cs); !errors.Is(err, noBase) || handed != nil {
		t.Errorf("without its base: %v, and %q was handed out", err, handed)
	}
	if _, err := bundle.Read(t.Context(), bytes.NewReader(full), cs); err != nil {
		t.Fatal(err)
	}
	delete(here, w.layer.Digest)
	handed = nil
	if _, err := bundle.Read(t.Context(), bytes.NewReader(delta), cs); !errors.Is(err, noBase) || handed != nil {
		t.Errorf("without a piece of its base: %v, and %q was handed out", err, handed)
	}
	here[w.layer.Digest] = w.content[w.layer.Digest]
	c, err := bundle.Read(t.Context(), bytes.NewReader(delta), cs)
	if err != nil {
		t.Fatal(err)
	}
	for _, im := range c.Images {
		for todo := []digest.Digest{im.Digest}; len(todo) > 0; todo = todo[1:] {
			b, ok := here[todo[0]]
			if !ok {
				t.Errorf("%s lacks %s", im.Ref, todo[0])
			}
			if d, err := describe(b); err == nil {
				for _, r := range d.Refers {
					if im.Platforms == nil || r.Platform == "" || slices.Contains(im.Platforms, r.Platform) {
						todo = append(todo, r.Digest)
					}
				}
			}
		}
	}
}

// An index of which one ref wants some platforms only is to be whole nevertheless
// when it is part of what another ref wants.
func TestPartOfAnotherIndexMustBeWhole(t *testing.T) {
	w := newWorld()
	outer := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{descriptor(ocispec.MediaTypeImageIndex, w.index)}}
	outer.SchemaVersion = 2
	all := w.content.manifest(outer)
	outer.Manifests = append(outer.Manifests, descriptor(ocispec.MediaTypeImageManifest, w.child))
	outer.Manifests[1].Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	some := w.content.manifest(outer)
	for _, tt := range []struct {
		name      string
		outer     bundle.Blob
		platforms []string
		fine      bool
	}{
		{"all of it is wanted", all, nil, false},
		{"something else is wanted", some, []string{"linux/amd64"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			log := &memoryLog{key: logKey}
			log.see(audit.FirstSeen, one, "", w.index.Digest, w.index.Digest)
			log.see(audit.FirstSeen, two, "", tt.outer.Digest, tt.outer.Digest)
			e := w.full
			images := slices.Clone(w.full.Contents.Images)
			images[0] = bundle.Image{Ref: two.String(), Digest: tt.outer.Digest, Size: tt.outer.Size, MediaType: ocispec.MediaTypeImageIndex, Platforms: tt.platforms, Index: 1}
			images[1].Index = 0
			e.Contents = bundle.Contents{Images: images, Manifests: []bundle.Blob{w.index, w.child, tt.outer}, Blobs: []bundle.Blob{w.config, w.layer}}
			e.Checkpoint, e.Events, e.Hashes = log.checkpoint(), log.events(0, one, two), log
			packed, _ := pack(t, e)
			_, err := bundle.Read(t.Context(), bytes.NewReader(packed), checks())
			var wrong *bundle.WrongError
			switch {
			case tt.fine && err != nil:
				t.Error(err)
			case !tt.fine && (!errors.As(err, &wrong) || wrong.Entry != "blobs/sha256/"+w.index.Digest.Encoded()):
				t.Errorf("%v; want a WrongError about the index that is not whole", err)
			}
		})
	}
}
