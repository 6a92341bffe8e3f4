package carry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
	"golang.org/x/mod/sumdb/note"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/bundle"
	"tidemark/audit/sqlite"
	"tidemark/cache"
	"tidemark/cache/disk"
	"tidemark/proxy"
	"tidemark/proxy/carry"
	"tidemark/proxy/oci"
	"tidemark/proxy/upstream"
	"tidemark/proxy/upstream/upstreamtest"
)

// A place is what a server has, without its listeners.
type place struct {
	t        *testing.T
	dir      string
	store    *sqlite.Store
	cache    *cache.Cache
	ledger   *audit.Ledger
	signer   *audit.Signer
	contents *proxy.Contents
	carrier  *carry.Carrier
	fails    *failing
}

type settings struct {
	dir    string
	max    int64
	policy *audit.Policy
}

// newPlace starts a place whose docker.io is up, or offline.
func newPlace(t *testing.T, up *upstreamtest.Registry, s settings) *place {
	t.Helper()
	if s.dir == "" {
		s.dir = t.TempDir()
	}
	if s.max == 0 {
		s.max = 1 << 30
	}
	log := zerolog.New(io.Discard)
	p := &place{t: t, dir: s.dir}
	origin := "tidemark.test/" + filepath.Base(filepath.Dir(s.dir)) + filepath.Base(s.dir)
	var err error
	if p.store, err = sqlite.Open(t.Context(), filepath.Join(s.dir, "audit.db"), origin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.store.Close() })
	key, err := audit.OpenKey(s.dir, origin, true)
	if err != nil {
		t.Fatal(err)
	}
	d, err := disk.Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	p.signer = audit.NewSigner(p.store, key, filepath.Join(s.dir, "anchor"), nil, log)
	p.cache = cache.New(cache.Options{Store: d, Budget: func(int64) int64 { return s.max }, Describe: describe, Log: log, Pins: p.pins})
	p.ledger = audit.New(audit.Options{Store: p.store, Memory: p.store, Policy: s.policy, Log: log, Recorded: func(int64, audit.Event) { p.signer.Grown() }})
	o := upstream.Options{Name: "docker.io", Offline: up == nil, Endpoints: []*url.URL{{Scheme: "http", Host: "registry.invalid"}}}
	if up != nil {
		o.Endpoints = []*url.URL{up.URL()}
	}
	upstreams := map[string]*upstream.Upstream{"docker.io": upstream.New(o)}
	p.contents = proxy.NewContents(upstreams, p.cache, func(upstream, repository string, list []audit.Referrer) {
		if err := p.store.AddReferrers(context.Background(), upstream, repository, list); err != nil {
			t.Error(err)
		}
	}, p.store.History)
	p.fails = &failing{Store: p.store}
	p.carrier = carry.New(carry.Options{Cache: p.cache, Ledger: p.ledger, Signer: p.signer, Store: p.fails, Upstream: func(name string) bool { return upstreams[name] != nil }})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{}, 2)
	for _, run := range []func(context.Context) error{p.cache.Run, p.signer.Run} {
		go func() { _ = run(ctx); done <- struct{}{} }()
	}
	t.Cleanup(func() { cancel(); <-done; <-done })
	for !p.cache.Stats().Ready {
		time.Sleep(time.Millisecond)
	}
	return p
}

func (p *place) pins(ctx context.Context) iter.Seq2[cache.Pin, error] {
	return func(yield func(cache.Pin, error) bool) {
		for k, err := range p.store.Keep(ctx, 0, time.Now()) {
			pin := cache.Pin{Digest: k.Digest, Firm: k.Firm}
			if err == nil && k.Platforms != nil {
				pin.Children = p.contents.Children(ctx, k.Digest, k.Platforms)
			}
			if !yield(pin, err) {
				return
			}
		}
	}
}

func describe(b []byte) (cache.Description, error) {
	d, err := oci.Describe(b)
	out := cache.Description{MediaType: d.MediaType, Index: d.Index}
	for _, r := range d.Refers {
		out.Refers = append(out.Refers, cache.Reference{Digest: r.Digest, Size: r.Size})
	}
	return out, err
}

// failing is a store whose imports fail, before or after they are done.
type failing struct {
	*sqlite.Store
	before, after error
}

func (f *failing) Import(ctx context.Context, c audit.Cargo, e audit.Event, next func(audit.Carried, audit.Record, time.Time) (audit.State, []audit.Event)) (int64, error) {
	if f.before != nil {
		return 0, f.before
	}
	n, err := f.Store.Import(ctx, c, e, next)
	return n, errors.Join(err, f.after)
}

func ref(name string) audit.Ref {
	r, err := audit.ParseRef("docker.io/library/" + name)
	if err != nil {
		panic(err)
	}
	return r
}

func (p *place) warm(names ...string) {
	p.t.Helper()
	for _, name := range names {
		w, err := p.contents.Warm(p.t.Context(), p.ledger, proxy.Want{Ref: ref(name)}, nil, func(digest.Digest, int64, int64) {})
		if err != nil || !w.Image.Complete() {
			p.t.Fatalf("warm %s: %+v, %v", name, w, err)
		}
	}
}

func (p *place) export(q carry.Request) []byte {
	p.t.Helper()
	var b bytes.Buffer
	if _, err := p.carrier.Export(p.t.Context(), &b, q); err != nil {
		p.t.Fatal(err)
	}
	return b.Bytes()
}

// since is what a client sends that has a bundle.
func since(t *testing.T, packed []byte, key string) *carry.Since {
	t.Helper()
	list, err := bundle.Read(t.Context(), bytes.NewReader(packed), bundle.Checks{Verifier: trusting(key), Describe: carry.Describe})
	if err != nil {
		t.Fatal(err)
	}
	s := &carry.Since{Bundle: list.ID(), LogSize: list.LogSize}
	for _, im := range list.Images {
		r, err := audit.ParseRef(im.Ref)
		if err != nil {
			t.Fatal(err)
		}
		s.Refs = append(s.Refs, r)
	}
	for _, b := range slices.Concat(list.Manifests, list.Blobs, list.Omitted) {
		s.Content = append(s.Content, b.Digest)
	}
	return s
}

func trusting(key string) func(string) (note.Verifier, error) {
	return func(string) (note.Verifier, error) { return note.NewVerifier(key) }
}

// serves is what the tag means to clients, "" if it is not known.
func (p *place) serves(name string) digest.Digest {
	p.t.Helper()
	st, err := p.store.State(p.t.Context(), ref(name))
	if err != nil {
		p.t.Fatal(err)
	}
	return p.ledger.Tag(ref(name), st).Serves()
}

// nothing wants a place where nothing was taken in.
func (p *place) nothing(what string) {
	p.t.Helper()
	tree, err := p.store.Tree(p.t.Context())
	if err != nil || tree.N != 0 {
		p.t.Errorf("%s: %d events, %v", what, tree.N, err)
	}
	for _, dir := range []string{"blobs/sha256", "blobs/sha512"} {
		if files, err := os.ReadDir(filepath.Join(p.dir, dir)); err != nil || len(files) != 0 {
			p.t.Errorf("%s: %d files in %s, %v", what, len(files), dir, err)
		}
	}
}

// sound wants every file to hash to its name, and the log to be whole.
func (p *place) sound() {
	p.t.Helper()
	files, err := os.ReadDir(filepath.Join(p.dir, "blobs/sha256"))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(p.dir, "blobs/sha256", f.Name()))
		if err != nil || digest.FromBytes(b).Encoded() != f.Name() {
			p.t.Errorf("%s holds other content, %v", f.Name(), err)
		}
	}
	audittest.Check(p.t, p.store)
}

// What one place has is carried to another, which serves it then without anybody to
// ask, with its history; a delta goes on from there; nothing changes when either comes
// again, and the same state is always the same bytes.
func TestImagesAreCarried(t *testing.T) {
	t.Parallel() // they wait for signatures
	up := upstreamtest.New()
	defer up.Close()
	idx, img := upstreamtest.NewIndex("base", "multi"), upstreamtest.NewImage("base", "one")
	up.PushIndex("library/multi", "1", idx)
	up.Push("library/app", "1", img)
	signature := upstreamtest.NewContent("application/vnd.oci.image.manifest.v1+json", fmt.Appendf(nil,
		`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.example","config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":%d},"layers":[],"subject":{"mediaType":%q,"digest":%q,"size":%d}}`,
		img.Config.Digest, len(img.Config.Body), img.Manifest.MediaType, img.Manifest.Digest, len(img.Manifest.Body)))
	up.Refer("library/app", img.Manifest.Digest, "application/vnd.example", signature)
	from := newPlace(t, up, settings{})
	from.warm("multi:1", "app:1")
	q := carry.Request{Refs: []audit.Ref{ref("multi:1"), ref("app:1")}}
	monday := from.export(q)
	if again := from.export(carry.Request{Refs: []audit.Ref{ref("app:1"), ref("multi:1")}}); !bytes.Equal(again, monday) {
		t.Error("the same state makes another bundle")
	}
	key := from.signer.VKey()

	to := newPlace(t, nil, settings{})
	for range 2 {
		in, err := to.carrier.Import(t.Context(), bytes.NewReader(monday), key)
		if err != nil || len(in.Refs) != 2 {
			t.Fatalf("%+v, %v", in, err)
		}
		to.sound()
		if to.serves("app:1") != img.Manifest.Digest || to.serves("multi:1") != idx.Manifest.Digest {
			t.Errorf("it serves %s and %s", to.serves("app:1"), to.serves("multi:1"))
		}
		for _, d := range []digest.Digest{img.Manifest.Digest, idx.Manifest.Digest} {
			if im, err := to.contents.Image(t.Context(), d, nil, true); err != nil || !im.Complete() {
				t.Errorf("%s: %+v, %v", d, im, err)
			}
		}
		if list, err := to.store.Referrers(t.Context(), "docker.io", "library/app", img.Manifest.Digest); err != nil || len(list) != 1 || list[0].Digest != signature.Digest {
			t.Errorf("what refers to it: %v, %v", list, err)
		}
	}
	if tree, err := to.store.Tree(t.Context()); err != nil || tree.N != 3 {
		t.Errorf("%d events, want the import and the two refs", tree.N)
	}

	moved := upstreamtest.NewImage("base", "two")
	up.Push("library/app", "1", moved)
	from.warm("app:1")
	q.Since = since(t, monday, key)
	tuesday := from.export(q)
	if len(tuesday) >= len(monday) {
		t.Errorf("the delta has %d bytes, the whole %d", len(tuesday), len(monday))
	}
	in, err := to.carrier.Import(t.Context(), bytes.NewReader(tuesday), "")
	if err != nil {
		t.Fatal(err)
	}
	if got := in.Refs[0].Became + " " + in.Refs[1].Became; got != "moved same" {
		t.Errorf("the delta made %+v", in.Refs)
	}
	to.sound()
	if im, err := to.contents.Image(t.Context(), moved.Manifest.Digest, nil, true); err != nil || !im.Complete() || to.serves("app:1") != moved.Manifest.Digest {
		t.Errorf("after the delta %s is served: %+v, %v", to.serves("app:1"), im, err)
	}
	claims, err := to.store.Claims(t.Context(), ref("app:1"))
	meant := slices.DeleteFunc(slices.Clone(claims), func(c audit.Claim) bool { return c.Served })
	served := slices.DeleteFunc(claims, func(c audit.Claim) bool { return !c.Served })
	for _, list := range [][]audit.Claim{meant, served} {
		if err != nil || len(list) != 2 || list[0].Digest != moved.Manifest.Digest || list[0].Until != nil || list[1].Digest != img.Manifest.Digest || list[1].Until == nil {
			t.Errorf("the history there: %+v, %v", list, err)
		}
	}

	// And a delta goes on from a delta.
	q.Since = since(t, tuesday, key)
	up.PushIndex("library/multi", "1", upstreamtest.NewIndex("base", "multi 2"))
	from.warm("multi:1")
	if in, err := to.carrier.Import(t.Context(), bytes.NewReader(from.export(q)), ""); err != nil || in.Refs[0].Became+" "+in.Refs[1].Became != "same moved" {
		t.Errorf("a delta to a delta: %+v, %v", in, err)
	}
	to.sound()

	// The first bundle once more is older than what is here, and changes nothing.
	if in, err := to.carrier.Import(t.Context(), bytes.NewReader(monday), ""); err != nil || !in.Already || in.Refs[0].Became != audit.CarriedOlder || to.serves("app:1") != moved.Manifest.Digest {
		t.Errorf("the first once more: %+v, %v", in, err)
	}

	// An index instead of a bundle: what was served after that entry is taken to be there.
	q.Since = &carry.Since{LogSize: since(t, monday, key).LogSize}
	byIndex := from.export(q)
	third := newPlace(t, nil, settings{})
	var unfit *carry.UnfitError
	if _, err := third.carrier.Import(t.Context(), bytes.NewReader(byIndex), key); !errors.As(err, &unfit) || !strings.Contains(err.Error(), "at 2 entries") {
		t.Errorf("a delta without its base: %v", err)
	}
	if _, err := third.carrier.Import(t.Context(), bytes.NewReader(tuesday), key); !errors.As(err, &unfit) || !strings.Contains(err.Error(), since(t, monday, key).Bundle.String()) {
		t.Errorf("a delta without its base: %v; want it named", err)
	}
	third.nothing("a delta without its base")
	if _, err := third.carrier.Import(t.Context(), bytes.NewReader(monday), key); err != nil {
		t.Fatal(err)
	}
	if _, err := third.carrier.Import(t.Context(), bytes.NewReader(byIndex), key); err != nil || third.serves("app:1") != moved.Manifest.Digest {
		t.Errorf("with its base: %v, it serves %s", err, third.serves("app:1"))
	}
	third.sound()
}

// What is not here whole is not exported, with every reason; platforms narrow what is
// needed.
func TestAnExportIsWhole(t *testing.T) {
	t.Parallel() // they wait for signatures
	up := upstreamtest.New()
	defer up.Close()
	idx := upstreamtest.NewIndex("base")
	up.PushIndex("library/multi", "1", idx)
	from := newPlace(t, up, settings{})
	refs := []audit.Ref{ref("multi:1"), ref("never:1")}
	var b bytes.Buffer
	var unfit *carry.UnfitError
	if _, err := from.carrier.Export(t.Context(), &b, carry.Request{Refs: refs}); !errors.As(err, &unfit) || len(unfit.Problems) != 2 || b.Len() != 0 {
		t.Errorf("never seen: %v, %d bytes", err, b.Len())
	}
	if _, err := from.contents.Warm(t.Context(), from.ledger, proxy.Want{Ref: refs[0]}, []string{"linux/amd64"}, func(digest.Digest, int64, int64) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := from.carrier.Export(t.Context(), &b, carry.Request{Refs: refs[:1]}); !errors.As(err, &unfit) || !strings.Contains(err.Error(), "linux") && !strings.Contains(err.Error(), "warm") || b.Len() != 0 {
		t.Errorf("half of it: %v, %d bytes", err, b.Len())
	}
	if _, err := from.carrier.Export(t.Context(), &b, carry.Request{Refs: refs[:1], Platforms: []string{"windows/amd64"}}); !errors.As(err, &unfit) || b.Len() != 0 {
		t.Errorf("a platform that there is not: %v", err)
	}
	up.Push("library/amd", "1", upstreamtest.NewImage("for amd64"))
	from.warm("amd:1")
	if _, err := from.carrier.Export(t.Context(), &b, carry.Request{Refs: []audit.Ref{ref("amd:1")}, Platforms: []string{"linux/arm64"}}); !errors.As(err, &unfit) || !strings.Contains(err.Error(), "no image for linux/arm64") {
		t.Errorf("an image of another platform: %v", err)
	}
	packed := from.export(carry.Request{Refs: refs[:1], Platforms: []string{"linux/amd64"}})
	to := newPlace(t, nil, settings{})
	if _, err := to.carrier.Import(t.Context(), bytes.NewReader(packed), from.signer.VKey()); err != nil {
		t.Fatal(err)
	}
	if im, err := to.contents.Image(t.Context(), idx.Manifest.Digest, []string{"linux/amd64"}, true); err != nil || !im.Complete() {
		t.Errorf("%+v, %v", im, err)
	}
	if im, err := to.contents.Image(t.Context(), idx.Manifest.Digest, nil, true); err != nil || im.Complete() {
		t.Errorf("all platforms: %+v, %v", im, err)
	}
}

// A bundle that is wrong anywhere is refused whole: nothing of it is visible, on the
// disk or in the log, wherever it was found.
func TestAWrongBundleLeavesNothing(t *testing.T) {
	t.Parallel() // they wait for signatures
	up := upstreamtest.New()
	defer up.Close()
	up.Push("library/app", "1", upstreamtest.NewImage("base", "one"))
	from := newPlace(t, up, settings{})
	from.warm("app:1")
	packed := from.export(carry.Request{Refs: []audit.Ref{ref("app:1")}})
	key := from.signer.VKey()
	to := newPlace(t, nil, settings{})
	for i := 0; i < len(packed); i += 509 {
		b := bytes.Clone(packed)
		b[i] ^= 0x10
		var wrong *bundle.WrongError
		var untrusted *carry.UntrustedError
		if _, err := to.carrier.Import(t.Context(), bytes.NewReader(b), key); !errors.As(err, &wrong) && !errors.As(err, &untrusted) {
			t.Fatalf("byte %d: %v", i, err)
		}
		to.nothing(fmt.Sprintf("byte %d", i))
		if _, err := to.carrier.Import(t.Context(), bytes.NewReader(packed[:i]), key); !errors.As(err, &wrong) {
			t.Fatalf("cut off after %d bytes: %v", i, err)
		}
		to.nothing(fmt.Sprintf("cut off after %d bytes", i))
	}
	if left, err := os.ReadDir(filepath.Join(to.dir, "partial")); err != nil || len(left) != 0 {
		t.Errorf("%d files are left of wrong bundles, %v", len(left), err)
	}
	for name, trust := range map[string]string{"no key is trusted": "", "another key is": to.signer.VKey()} {
		var untrusted *carry.UntrustedError
		if _, err := to.carrier.Import(t.Context(), bytes.NewReader(packed), trust); !errors.As(err, &untrusted) || !strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", name, err)
		}
		to.nothing(name)
	}
	if entries, err := os.ReadDir(to.dir); err != nil || len(entries) > 8 {
		t.Errorf("the data folder has %v, %v", entries, err)
	}
	if _, err := to.carrier.Import(t.Context(), bytes.NewReader(packed), key); err != nil {
		t.Errorf("and the right one: %v", err)
	}
}

// What has no room, or is of an upstream that is not configured, is refused before
// anything is written.
func TestABundleMustFit(t *testing.T) {
	t.Parallel() // they wait for signatures
	up := upstreamtest.New()
	defer up.Close()
	up.Push("library/app", "1", upstreamtest.NewImage(strings.Repeat("large", 1000)))
	from := newPlace(t, up, settings{})
	from.warm("app:1")
	packed := from.export(carry.Request{Refs: []audit.Ref{ref("app:1")}})
	small := newPlace(t, nil, settings{max: 4000})
	if _, err := small.carrier.Import(t.Context(), bytes.NewReader(packed), from.signer.VKey()); !errors.Is(err, cache.ErrNoRoom) {
		t.Errorf("no room: %v", err)
	}
	small.nothing("no room")
	o := carry.Options{Cache: small.cache, Ledger: small.ledger, Signer: small.signer, Store: small.store, Upstream: func(string) bool { return false }}
	var unfit *carry.UnfitError
	if _, err := carry.New(o).Import(t.Context(), bytes.NewReader(packed), from.signer.VKey()); !errors.As(err, &unfit) || !strings.Contains(err.Error(), "docker.io is not a configured upstream") {
		t.Errorf("no such upstream: %v", err)
	}
	small.nothing("no such upstream")
}

// An import whose ledger fails, or says so although it has recorded it, is told; the
// next try ends well, and there is one record of it.
func TestAnImportWhoseLedgerFails(t *testing.T) {
	t.Parallel() // they wait for signatures
	up := upstreamtest.New()
	defer up.Close()
	img := upstreamtest.NewImage("one")
	up.Push("library/app", "1", img)
	from := newPlace(t, up, settings{})
	from.warm("app:1")
	packed := from.export(carry.Request{Refs: []audit.Ref{ref("app:1")}})
	for _, done := range []bool{false, true} {
		t.Run(fmt.Sprint("done=", done), func(t *testing.T) {
			to := newPlace(t, nil, settings{})
			if to.fails.before = errors.New("disk full"); done {
				to.fails.before, to.fails.after = nil, errors.New("disk full")
			}
			if _, err := to.carrier.Import(t.Context(), bytes.NewReader(packed), from.signer.VKey()); !errors.Is(err, audit.ErrLedger) {
				t.Fatalf("a failure was not told: %v", err)
			}
			to.sound()
			to.fails.before, to.fails.after = nil, nil
			in, err := to.carrier.Import(t.Context(), bytes.NewReader(packed), from.signer.VKey())
			if err != nil || in.Already != done || to.serves("app:1") != img.Manifest.Digest {
				t.Errorf("again: %+v, %v", in, err)
			}
			to.sound()
			if tree, err := to.store.Tree(t.Context()); err != nil || tree.N != 2 {
				t.Errorf("%d events, want the import and the ref", tree.N)
			}
		})
	}
}

// A rule that holds back moves holds back those that come by a bundle: what is served
// stays, with its bytes.
func TestAPolicyHoldsWhatIsCarried(t *testing.T) {
	t.Parallel() // they wait for signatures
	up := upstreamtest.New()
	defer up.Close()
	old, moved := upstreamtest.NewImage("one"), upstreamtest.NewImage("two")
	up.Push("library/app", "1", old)
	from := newPlace(t, up, settings{})
	from.warm("app:1")
	q := carry.Request{Refs: []audit.Ref{ref("app:1")}}
	policy, errs := audit.Compile(audit.PolicyText{Rules: []audit.RuleText{{Match: "**", Mode: audit.HoldMode}}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	to := newPlace(t, nil, settings{policy: policy})
	for _, want := range []string{audit.CarriedNew, audit.CarriedHeld} {
		in, err := to.carrier.Import(t.Context(), bytes.NewReader(from.export(q)), from.signer.VKey())
		if err != nil || in.Refs[0].Became != want || to.serves("app:1") != old.Manifest.Digest {
			t.Errorf("%+v, %v; want %s", in, err, want)
		}
		up.Push("library/app", "1", moved)
		from.warm("app:1")
	}
	for _, img := range []upstreamtest.Image{old, moved} {
		if im, err := to.contents.Image(t.Context(), img.Manifest.Digest, nil, true); err != nil || !im.Complete() {
			t.Errorf("%+v, %v", im, err)
		}
	}
	to.sound()
}
