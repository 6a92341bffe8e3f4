package proxy_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/diff"
	"tidemark/cache"
	"tidemark/proxy/upstream/upstreamtest"
)

// A clock is time that a test moves.
type clock struct{ now atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.now.Store(time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC).UnixNano())
	return c
}

func (c *clock) Now() time.Time          { return time.Unix(0, c.now.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.now.Add(int64(d)) }

func policy(t *testing.T, rules ...audit.RuleText) *audit.Policy {
	t.Helper()
	p, errs := audit.Compile(audit.PolicyText{Rules: rules})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	return p
}

var holdAll = audit.RuleText{Name: "careful", Match: "**", Mode: audit.HoldMode}

// What is held is served as it was, byte for byte, with upstream having moved
// the tag and forgotten the image, and although only a part of it had been pulled
// by then: the rest was fetched when the hold began. It is told in the answer's
// head; and when somebody approves, the next pull gets the new image.
func TestHeldTagIsServedWhateverUpstreamForgets(t *testing.T) {
	m := newMirror(t, settings{policy: policy(t, holdAll), kept: true})
	old, next := upstreamtest.NewImage("base", "old app"), upstreamtest.NewImage("base", "new app")
	m.hub.Push("library/app", "latest", old)
	if a := m.get("/v2/app/manifests/latest"); a.status != 200 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	m.hub.Push("library/app", "latest", next)
	a := m.do("HEAD", "/v2/app/manifests/latest")
	held := next.Manifest.Digest.String() + "; reason=hold"
	if a.header.Get("Docker-Content-Digest") != old.Manifest.Digest.String() || a.header.Get("Tidemark-Held") != held || a.header.Get("Tidemark-Log-Index") != "2" {
		t.Errorf("held: %v", a.header)
	}
	for deadline := time.Now().Add(10 * time.Second); m.cache.Presence(old.Manifest.Digest) != cache.Here; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("what is held was not completed")
		}
	}
	m.hub.Delete("library/app", old.Manifest.Digest.String())
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 404, Path: "/blobs/"})
	m.pull("app", "latest", old)
	if a := m.get("/v2/app/manifests/" + next.Manifest.Digest.String()); a.status != 200 {
		t.Errorf("the new digest by itself: %d; a pin is a decision of its own", a.status)
	}
	m.hub.Mend()
	if _, err := m.ledger.Decide(t.Context(), audit.Ref{Upstream: "docker.io", Repository: "library/app", Tag: "latest"},
		audit.Decision{Action: audit.Approve, Digest: next.Manifest.Digest, Reason: "read"}); err != nil {
		t.Fatal(err)
	}
	m.pull("app", "latest", next)
	if a := m.do("HEAD", "/v2/app/manifests/latest"); a.header.Get("Tidemark-Held") != "" {
		t.Errorf("nothing is held any more: %v", a.header)
	}
	if got := types(audittest.Check(t, m.store)); got != "[tag.first_seen tag.moved tag.held operator.action tag.released]" {
		t.Errorf("events are %s", got)
	}
}

// Of an index, a hold keeps the images that clients have pulled, and of one that
// nobody has pulled from that for this machine.
func TestHoldOfAnIndexKeepsWhatClientsPull(t *testing.T) {
	m := newMirror(t, settings{policy: policy(t, holdAll), kept: true})
	idx, next := upstreamtest.NewIndex("layer"), upstreamtest.NewIndex("other layer")
	m.hub.PushIndex("library/multi", "1", idx)
	arm := idx.Images[1]
	m.get("/v2/multi/manifests/1")
	if a := m.get("/v2/multi/manifests/" + arm.Manifest.Digest.String()); a.status != 200 {
		t.Fatal(a.status)
	}
	m.hub.PushIndex("library/multi", "1", next)
	m.get("/v2/multi/manifests/1")
	for deadline := time.Now().Add(10 * time.Second); m.cache.Presence(arm.Manifest.Digest) != cache.Here; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the image that a client had pulled was not completed")
		}
	}
	if p := m.cache.Presence(idx.Images[0].Manifest.Digest); p != cache.Gone {
		t.Errorf("the image that nobody pulled is %s", p)
	}
}

// A rule can refuse: a tag that is denied without asking upstream, one that is
// too new until it is not. Both are 404, and say why.
func TestPolicyRefuses(t *testing.T) {
	clk := newClock()
	m := newMirror(t, settings{now: clk.Now, policy: policy(t,
		audit.RuleText{Name: "no", Match: "docker.io/library/evil:*", Mode: audit.Deny},
		audit.RuleText{Name: "slow", Match: "**", Mode: audit.Cooldown, Age: time.Hour, OnNew: audit.NewRefuse})})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/evil", "1", img)
	m.hub.Push("library/new", "1", img)
	for _, repo := range []string{"evil", "new"} {
		a := m.get("/v2/" + repo + "/manifests/1")
		if a.status != 404 || a.code(t) != "MANIFEST_UNKNOWN" || !strings.Contains(string(a.body), `"policy":true`) {
			t.Errorf("%s: %d %s", repo, a.status, a.body)
		}
	}
	if n := m.hub.Count("", "library/evil"); n != 0 {
		t.Errorf("upstream was asked %d times for what is denied", n)
	}
	clk.advance(time.Hour)
	m.pull("new", "1", img)
}

// R1: what a client accepts never reaches upstream, so that the digest a tag
// answers with does not depend on who happened to ask.
func TestR1ClientsAcceptIsNotUpstreams(t *testing.T) {
	m := newMirror(t, settings{})
	idx := upstreamtest.NewIndex("layer")
	m.hub.PushIndex("library/multi", "1", idx)
	m.hub.PushVariant("library/multi", "1", idx.Images[0].Manifest)
	for _, accept := range []string{"", "*/*", ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v1+prettyjws", ocispec.MediaTypeImageIndex} {
		a := m.do("HEAD", "/v2/multi/manifests/1", "Accept: "+accept)
		if d := a.header.Get("Docker-Content-Digest"); d != idx.Manifest.Digest.String() {
			t.Errorf("Accept %q: %s, want the index", accept, d)
		}
	}
	if got := types(audittest.Check(t, m.store)); got != "[tag.first_seen]" {
		t.Errorf("events are %s; want no move", got)
	}
	for _, q := range m.hub.Requests() {
		if strings.Contains(q.Path, "/manifests/") && (!strings.HasPrefix(q.Accept, ocispec.MediaTypeImageIndex+", ") || strings.Contains(q.Accept, "*/*")) {
			t.Errorf("upstream was asked with Accept %q", q.Accept)
		}
	}
}

// R6: upstream's troubles never delete a tag and never move it, in whatever order
// they come; its list of tags does not either. Only absences that its list agrees
// with do.
func TestR6OnlyAbsenceDeletes(t *testing.T) {
	clk := newClock()
	m := newMirror(t, settings{now: clk.Now, policy: policy(t, audit.RuleText{Match: "**", Mode: audit.Observe, OnDeleted: audit.DeletedRefuse})})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/app", "1", img)
	m.hub.Push("library/app", "2", img)
	m.pull("app", "1", img)
	for range 2 {
		for _, status := range []int64{401, 403, 429, 500, 503} {
			clk.advance(40 * time.Minute)
			m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: status, Path: "/manifests/1", Times: 1})
			if a := m.do("HEAD", "/v2/app/manifests/1"); a.status != 200 {
				t.Errorf("upstream says %d: %d", status, a.status)
			}
		}
	}
	waitForBreaker(t, m)
	before := types(audittest.Check(t, m.store))
	if strings.Contains(before, "moved") || strings.Contains(before, "deleted") {
		t.Errorf("troubles are told as %s", before)
	}
	// It answers 404, but its list still has the tag.
	for range 4 {
		clk.advance(40 * time.Minute)
		m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 404, Path: "/manifests/1", Times: 1})
		if a := m.do("HEAD", "/v2/app/manifests/1"); a.status != 200 || !strings.Contains(a.header.Get("Cache-Status"), "fwd-status=404") {
			t.Errorf("the list has it: %d %q", a.status, a.header.Get("Cache-Status"))
		}
		m.forget404()
	}
	if got := types(audittest.Check(t, m.store)); strings.Contains(got, "deleted") {
		t.Errorf("the list has it: %s", got)
	}
	m.hub.Delete("library/app", "1")
	clk.advance(40 * time.Minute)
	if a := m.do("HEAD", "/v2/app/manifests/1"); a.status != 404 {
		t.Errorf("the list lacks it, too: %d, want 404", a.status)
	}
	if got := types(audittest.Check(t, m.store)); !strings.HasSuffix(got, "tag.deleted]") {
		t.Errorf("events are %s, want a deletion at the end", got)
	}
	m.hub.Push("library/app", "1", img)
	m.forget404()
	m.pull("app", "1", img)
	if got := types(audittest.Check(t, m.store)); !strings.HasSuffix(got, "tag.deleted tag.restored]") {
		t.Errorf("events are %s, want a restoration at the end", got)
	}
}

// R6: a repository that is gone whole is gone, if the registry answers at all.
func TestR6WholeRepositoryIsGone(t *testing.T) {
	clk := newClock()
	m := newMirror(t, settings{now: clk.Now, policy: policy(t, audit.RuleText{Match: "**", Mode: audit.Observe, OnDeleted: audit.DeletedRefuse})})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/app", "1", img)
	m.pull("app", "1", img)
	m.hub.Delete("library/app", "1")
	m.hub.Delete("library/app", img.Manifest.Digest.String())
	for i, want := range []int{200, 200, 404} {
		clk.advance(40 * time.Minute)
		if a := m.do("HEAD", "/v2/app/manifests/1"); a.status != want {
			t.Errorf("absence %d: %d, want %d", i, a.status, want)
		}
		m.forget404()
	}
}

// forget404 has upstream asked again at once: a 404 is believed for seconds.
func (m *mirror) forget404() {
	m.up.Forget("library/app", "1")
}

// waitForBreaker waits until upstream is asked again after its troubles.
func waitForBreaker(t *testing.T, m *mirror) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if a := m.do("HEAD", "/v2/app/manifests/1"); !strings.Contains(a.header.Get("Cache-Status"), "fwd-status=5") && !strings.Contains(a.header.Get("Cache-Status"), "fwd-status=4") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("upstream is not asked again")
		}
	}
}

// R12: a known tag is asked about with HEAD, which costs no rate limit; a GET
// follows a change only; and one answer serves everybody who waits.
func TestR12HeadOnlyUntilSomethingChanges(t *testing.T) {
	m := newMirror(t, settings{})
	old, next := upstreamtest.NewImage("old"), upstreamtest.NewImage("new")
	m.hub.Push("library/app", "1", old)
	m.pull("app", "1", old)
	m.hub.Reset()
	for range 10 {
		m.do("HEAD", "/v2/app/manifests/1")
	}
	if head, get := m.hub.Count("HEAD", "/manifests/1"), m.hub.Count("GET", "/manifests/"); head != 10 || get != 0 {
		t.Errorf("nothing changed: %d HEAD, %d GET; want 10 and none", head, get)
	}
	m.hub.Push("library/app", "1", next)
	m.hub.Reset()
	m.do("HEAD", "/v2/app/manifests/1")
	if head, get := m.hub.Count("HEAD", "/manifests/1"), m.hub.Count("GET", "/manifests/"); head != 1 || get != 1 {
		t.Errorf("it moved: %d HEAD, %d GET; want one each", head, get)
	}
	m.hub.Reset()
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 429, Method: "HEAD", Times: 1, Header: http.Header{"Retry-After": {"3600"}}})
	for range 5 {
		if a := m.do("HEAD", "/v2/app/manifests/1"); a.status != 200 {
			t.Errorf("rate limited: %d", a.status)
		}
	}
	if n := m.hub.Count("", "/manifests/"); n != 1 {
		t.Errorf("upstream asked us to wait, and was asked %d times", n)
	}
}

// Edges that differ for a while: every change is on the record with the edge that
// told it, and when they go on it is told as flapping.
func TestAlternatingEdges(t *testing.T) {
	clk := newClock()
	m := newMirror(t, settings{now: clk.Now})
	old, next := upstreamtest.NewImage("old"), upstreamtest.NewImage("new")
	m.hub.Push("library/app", "1", old)
	m.pull("app", "1", old)
	for i, img := range []upstreamtest.Image{next, old, next, old} {
		clk.advance(time.Minute)
		m.hub.Push("library/app", "1", img)
		m.hub.Break(upstreamtest.Fault{Method: "HEAD", Times: 1, Header: http.Header{"X-Served-By": {fmt.Sprintf("cache-%d", i%2)}}})
		m.do("HEAD", "/v2/app/manifests/1")
	}
	events := audittest.Check(t, m.store)
	if got := types(events); got != "[tag.first_seen tag.moved tag.reverted tag.reverted tag.flapping tag.reverted]" {
		t.Errorf("events are %s", got)
	}
	if e := events[2].Evidence; e.Edge != "cache-1" || e.Identity != "anonymous" || fmt.Sprint(e.Via) != "[HEAD GET]" || !e.BodyVerified {
		t.Errorf("the evidence is %+v", e)
	}
}

// A move explains itself: re-encoded manifests are no move of content, an index
// that grows amends, and the diff is stored as content that the leaf refers to.
func TestMovesExplainThemselves(t *testing.T) {
	m := newMirror(t, settings{})
	img := upstreamtest.NewImage("base", "app")
	m.hub.Push("library/app", "1", img)
	m.pull("app", "1", img)

	docker := img
	var manifest map[string]any
	if err := json.Unmarshal(img.Manifest.Body, &manifest); err != nil {
		t.Fatal(err)
	}
	manifest["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json"
	body, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	docker.Manifest = upstreamtest.NewContent("application/vnd.docker.distribution.manifest.v2+json", body)
	m.hub.Push("library/app", "1", docker)
	m.pull("app", "1", docker)

	next := upstreamtest.NewImage("base", "next app")
	m.hub.Push("library/app", "1", next)
	m.pull("app", "1", next)

	single := upstreamtest.NewIndex("base", "next app")
	m.hub.PushIndex("library/app", "1", single)
	m.get("/v2/app/manifests/1")

	events := audittest.Check(t, m.store)
	if got := types(events); got != "[tag.first_seen tag.repackaged tag.moved tag.moved]" {
		t.Fatalf("events are %s", got)
	}
	if e := events[1]; e.Class != audit.ClassRepackaged || e.Diff == nil {
		t.Errorf("re-encoded: %s, %+v", e.Class, e.Diff)
	}
	e := events[2]
	if e.Diff == nil || e.Diff.Layers != (audit.LayerCount{Shared: 1, Added: 1, Removed: 1}) || e.Diff.BytesDelta != int64(len("next app")-len("app")) {
		t.Fatalf("another layer: %+v", e.Diff)
	}
	stored, err := m.cache.Read(t.Context(), e.Diff.Digest, nil, 1<<20)
	if err != nil || digest.FromBytes(stored) != e.Diff.Digest || int64(len(stored)) != e.Diff.Size {
		t.Fatalf("the diff is not stored: %d bytes, %v", len(stored), err)
	}
	d, err := diff.Parse(stored)
	if err != nil || d.Old.Digest != docker.Manifest.Digest || d.New.Digest != next.Manifest.Digest || len(d.Changed) != 1 || d.Tier != 2 {
		t.Errorf("the diff says %s, %v", stored, err)
	}
	if grown := events[3]; grown.Class != audit.ClassPlatformAdded || fmt.Sprint(grown.Signals) != "[became_index]" || grown.Amends == nil || *grown.Amends != events[2].ID {
		t.Errorf("it became an index around the same image: %s %v, amends %v", grown.Class, grown.Signals, grown.Amends)
	}
}

// An index that moved is explained with what its clients ask for next, not with
// what nobody here pulls; whoever asks for the whole diff gets it from upstream.
func TestExplainingAnIndexCostsWhatClientsPull(t *testing.T) {
	m := newMirror(t, settings{})
	old, next := upstreamtest.NewIndex("base", "app"), upstreamtest.NewIndex("base", "next app")
	m.hub.PushIndex("library/multi", "1", old)
	m.get("/v2/multi/manifests/1")
	m.pull("multi", old.Images[0].Manifest.Digest.String(), old.Images[0])
	m.hub.PushIndex("library/multi", "1", next)
	m.hub.Reset()
	m.get("/v2/multi/manifests/1")
	if m.hub.Count("GET", next.Images[0].Manifest.Digest.String()) != 1 || m.hub.Count("", next.Images[1].Manifest.Digest.String()) != 0 || m.hub.Count("GET", "/blobs/") != 1 {
		t.Errorf("upstream was asked for %+v", m.hub.Requests())
	}
	e := audittest.Check(t, m.store)[1]
	if e.Diff == nil || e.Diff.Platforms.Changed != 2 || e.Diff.Layers.Added != 1 {
		t.Errorf("explained as %+v", e.Diff)
	}
	if got := fmt.Sprint(e.Signals); got != "[consumed_platform_changed]" {
		t.Errorf("clients have one of the platforms: %s", got)
	}
	other := upstreamtest.NewIndex("base", "only arm64 changed")
	x := content(t, ocispec.MediaTypeImageIndex, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		forPlatform(next.Images[0], "amd64"), forPlatform(other.Images[1], "arm64"),
	}})
	m.hub.PushIndex("library/multi", "1", upstreamtest.Index{Manifest: x, Images: []upstreamtest.Image{next.Images[0], other.Images[1]}})
	m.get("/v2/multi/manifests/1")
	if e := audittest.Check(t, m.store)[2]; fmt.Sprint(e.Signals) != "[unconsumed]" || e.Severity() != audit.Info {
		t.Errorf("nobody has the platform that changed: %v, %s", e.Signals, e.Severity())
	}
	ref := audit.Ref{Upstream: "docker.io", Repository: "library/multi", Tag: "1"}
	d, err := m.contents.Diff(t.Context(), ref, old.Manifest.Digest, next.Manifest.Digest)
	if err != nil || d.Tier != 2 || len(d.Unreadable) != 0 || len(d.Changed) != 2 {
		t.Errorf("the whole diff: tier %d, %v", d.Tier, err)
	}
}

// Offline, what is here is served as it was recorded, what is not is told as such
// at once, and nobody is asked.
func TestOfflineAsksNobody(t *testing.T) {
	dir := t.TempDir()
	m := newMirror(t, settings{dir: dir})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/app", "1", img)
	m.hub.Push("library/app", "2", upstreamtest.NewImage("other"))
	m.pull("app", "1", img)
	m.settled()
	m.store.Close()
	m.hub.Reset()
	m.start(settings{dir: dir, offline: true})
	m.pull("app", "1", img)
	if a := m.get("/v2/app/tags/list"); a.status != 200 || !strings.Contains(string(a.body), `["1"]`) {
		t.Errorf("the tags that are known: %d %s", a.status, a.body)
	}
	absent := digest.FromString("absent").String()
	for path, code := range map[string]string{
		"/v2/app/manifests/2": "MANIFEST_UNKNOWN", "/v2/app/manifests/" + absent: "MANIFEST_UNKNOWN", "/v2/app/blobs/" + absent: "BLOB_UNKNOWN", "/v2/other/tags/list": "NAME_UNKNOWN",
	} {
		if a := m.get(path); a.status != 404 || a.code(t) != code || !strings.Contains(string(a.body), `"offline":true`) {
			t.Errorf("%s: %d %s, want 404 %s that says why", path, a.status, a.body, code)
		}
	}
	if n := len(m.hub.Requests()); n != 0 {
		t.Errorf("upstream was asked %d times", n)
	}
}

// The history of a tag is answered without asking upstream, newest first, page
// by page; a tag never seen is 404, and so is the proposed name unless it is on.
func TestTagHistory(t *testing.T) {
	m := newMirror(t, settings{})
	var images []upstreamtest.Image
	for _, name := range []string{"one", "two", "three"} {
		img := upstreamtest.NewImage(name)
		images = append(images, img)
		m.hub.Push("library/app", "1", img)
		m.pull("app", "1", img)
	}
	m.hub.Reset()
	var got []string
	next := "/v2/app/_tidemark/tag-history/1?n=2"
	for next != "" {
		a := m.get(next)
		var list ocispec.Index
		if err := json.Unmarshal(a.body, &list); err != nil || a.status != 200 {
			t.Fatalf("%s: %d %s", next, a.status, a.body)
		}
		for _, d := range list.Manifests {
			got = append(got, d.Digest.String())
			if _, err := time.Parse(time.RFC3339, d.Annotations["org.opencontainers.tag.created"]); err != nil || d.MediaType == "" || d.Size == 0 || d.Annotations["dev.tidemark.basis"] != "observed" {
				t.Errorf("descriptor %+v", d)
			}
		}
		link := a.header.Get("Link")
		next = ""
		if before, _, ok := strings.Cut(strings.TrimPrefix(link, "<"), ">"); ok {
			next = before
		}
	}
	want := fmt.Sprint([]string{images[2].Manifest.Digest.String(), images[1].Manifest.Digest.String(), images[0].Manifest.Digest.String()})
	if fmt.Sprint(got) != want {
		t.Errorf("history is %v, want %s", got, want)
	}
	for path, status := range map[string]int{
		"/v2/app/_tidemark/tag-history/never": 404, "/v2/app/_oci/tag-history/1": 404, "/v2/app/_tidemark/tag-history/1?n=0": 400,
		"/v2/app/_tidemark/tag-history/1?before=yesterday": 400, "/v2/app/_tidemark/tag-history/1?last=x": 400, "/v2/app/_tidemark/tag-history/.x": 400,
		"/v2/app/_tidemark/tag-history/1?before=2020-01-01T00:00:00Z": 200,
	} {
		if a := m.get(path); a.status != status {
			t.Errorf("%s: %d %s, want %d", path, a.status, a.body, status)
		}
	}
	if n := len(m.hub.Requests()); n != 0 {
		t.Errorf("upstream was asked %d times", n)
	}
}
