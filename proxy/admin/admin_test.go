package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/torchwood"
	"github.com/opencontainers/go-digest"
	"github.com/rs/zerolog"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/audit/diff"
	"tidemark/audit/sqlite"
	"tidemark/cache"
	"tidemark/cache/disk"
	"tidemark/proxy/admin"
)

type fixture struct {
	url    string
	path   string // of the database
	store  *sqlite.Store
	ledger *audit.Ledger
	events *admin.Events
	gone   digest.Digest // whose bytes cannot be had
	why    error         // for this reason
	warn   []string
	worker *worker
}

// Complete implements admin.Contents.
func (f *fixture) Complete(_ context.Context, _ audit.Ref, d digest.Digest) error {
	if d == f.gone {
		return f.why
	}
	return nil
}

// Diff implements admin.Contents.
func (f *fixture) Diff(_ context.Context, _ audit.Ref, old, new digest.Digest) (*diff.Diff, error) {
	manifest := func(d digest.Digest) ([]byte, error) {
		return fmt.Appendf(nil, `{"schemaVersion":2,"config":{"digest":"%s"},"layers":[]}`, d), nil
	}
	return diff.Between(old, new, manifest)
}

var noon = time.Date(2026, 7, 1, 12, 0, 0, 0, time.UTC)

// serve starts the admin address of a server whose log has n signed entries.
func serve(t *testing.T, n int, token string) *fixture {
	t.Helper()
	dir := t.TempDir()
	store, err := sqlite.Open(t.Context(), filepath.Join(dir, "audit.db"), "tidemark.test/log")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	for i := range n {
		if _, err := audittest.Move(t.Context(), store, audittest.Ref(fmt.Sprint(i%3)), fmt.Sprint(i), noon.Add(time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	key, err := audit.OpenKey(dir, "tidemark.test/log", true)
	if err != nil {
		t.Fatal(err)
	}
	log := zerolog.New(io.Discard)
	signer := audit.NewSigner(store, key, filepath.Join(dir, "anchor"), nil, log)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // signs once more at the end, and that is all
	if err := signer.Run(ctx); err != nil {
		t.Fatal(err)
	}
	d, err := disk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := cache.New(cache.Options{Store: d, Budget: func(int64) int64 { return 1 << 20 }, Log: log})
	f := &fixture{path: filepath.Join(dir, "audit.db"), store: store, events: admin.NewEvents(), worker: &worker{}}
	policy, errs := audit.Compile(audit.PolicyText{Rules: []audit.RuleText{{Name: "careful", Match: "docker.io/library/held:*", Mode: audit.HoldMode}}})
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	f.ledger = audit.New(audit.Options{Store: store, Memory: store, Policy: policy, Recorded: func(int64, audit.Event) { f.events.Grown() }})
	exposures := audit.NewExposures(store, time.Hour, nil, log)
	m := admin.NewMetrics()
	upstreams := func() []admin.UpstreamStatus {
		left := int64(42)
		return []admin.UpstreamStatus{{Name: "docker.io", Healthy: true, RateLimitRemaining: &left}}
	}
	m.Watch(admin.Sources{Cache: c.Stats, Upstreams: upstreams, Tree: store.Tree, UnsignedSince: signer.UnsignedSince, HeldRefs: store.HeldRefs, Lag: func() time.Duration { return 0 }, Outbox: store.OutboxCounts, Alerts: store.AlertCounts})
	m.Request("manifest", "docker.io", "hit", 200, 10, time.Millisecond)
	m.Request("blob", "docker.io", "", 404, 0, time.Millisecond)
	m.Upstream("docker.io", 200)
	m.Recorded(audit.Event{Type: audit.Moved, Class: audit.ClassUnknown, Policy: audit.Effect{Mode: audit.Observe}})
	srv := httptest.NewServer(admin.New(admin.Options{
		Version: "test", Started: noon, Origin: "tidemark.test/log", Token: token,
		Cache: c, Views: store, Entries: store, Ledger: f.ledger, Contents: f, Signer: signer, Metrics: m, Events: f.events,
		History: store.History, RefOf: store.RefOf, Exposures: store.Exposures, FlushExposures: exposures.Flush, Conditions: store.Conditions,
		ParsePolicy: func(string) (*audit.Policy, error) { return nil, errors.New("line 1: no") },
		Upstreams:   upstreams, Warnings: func() []string { return f.warn },
		Disk:   func() admin.DiskStatus { return admin.DiskStatus{Total: 100, Free: 50, MinFree: 10} },
		Claims: store.Claims, Chronicle: store.Chronicle, EachTag: store.EachTag, Images: f.worker, Carrier: f.worker,
		Kept: func(ctx context.Context) iter.Seq2[audit.Kept, error] { return store.Keep(ctx, 1, noon) },
		CheckPlatforms: func(platforms []string) error {
			if slices.ContainsFunc(platforms, func(p string) bool { return !strings.HasPrefix(p, "linux/") }) {
				return errors.New("no platform")
			}
			return nil
		},
		ParseTime: func(s string) (time.Time, error) {
			if t, err := time.Parse(time.DateOnly, s); err == nil {
				return t, nil
			}
			return time.Parse(time.RFC3339, s)
		},
		Failed:    func(*http.Request, error) {},
		Alerts:    store,
		FeedToken: "for-readers",
		Describe: func(index int64, _ []byte, e audit.Event) (title, text string) {
			return fmt.Sprintf("%d %s & <more>\x1b[2J", index, e.Ref), "in full"
		},
		Backfill: func(_ context.Context, ref audit.Ref) (admin.BackfillReport, error) {
			return admin.BackfillReport{Ref: ref.String(), Source: "quay", Added: 1}, nil
		},
		Check: func(_ context.Context, ref *audit.Ref) []admin.UpstreamCheck {
			return []admin.UpstreamCheck{{Name: "docker.io", Anonymous: admin.Check{Status: 200}}}
		},
	}))
	t.Cleanup(srv.Close)
	f.url = srv.URL
	return f
}

func (f *fixture) get(t *testing.T, path string, headers ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest("GET", f.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// The log is what C2SP's formats say: other people's client reads every entry
// from its tiles, full and partial, and verifies each proof.
func TestLogIsReadByOthers(t *testing.T) {
	f := serve(t, 300, "")
	_, vkey := f.get(t, "/log/vkey")
	verifier, err := note.NewVerifier(strings.TrimSpace(vkey))
	if err != nil {
		t.Fatal(err)
	}
	policy := torchwood.ThresholdPolicy(2, torchwood.OriginPolicy("tidemark.test/log"), torchwood.SingleVerifierPolicy(verifier))
	_, signed := f.get(t, "/log/checkpoint")
	checkpoint, _, err := torchwood.VerifyCheckpoint([]byte(signed), policy)
	if err != nil || checkpoint.N != 300 {
		t.Fatalf("checkpoint of %d entries, %v", checkpoint.N, err)
	}
	tiles, err := torchwood.NewTileFetcher(f.url + "/log")
	if err != nil {
		t.Fatal(err)
	}
	client, err := torchwood.NewClient(tiles)
	if err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for i, leaf := range client.AllEntries(t.Context(), checkpoint.Tree, 0) {
		if i%97 == 0 {
			status, proof := f.get(t, fmt.Sprintf("/log/proof/%d", i))
			if err := torchwood.VerifyProof(policy, tlog.RecordHash(leaf), []byte(proof)); status != 200 || err != nil {
				t.Errorf("proof of %d: %d, %v", i, status, err)
			}
			var e admin.Event
			_, body := f.get(t, fmt.Sprintf("/api/v1/events/%d", i))
			if err := json.Unmarshal([]byte(body), &e); err != nil || string(e.Leaf) != string(leaf) {
				t.Errorf("the API's leaf %d is not the sealed one: %s, %v", i, e.Leaf, err)
			}
		}
		n++
	}
	if err := client.Err(); err != nil || n != 300 {
		t.Errorf("%d entries were read, %v", n, err)
	}
}

// Nothing is shown below /log that is not signed.
func TestUnsignedEntriesAreNotShown(t *testing.T) {
	f := serve(t, 3, "")
	for range 300 {
		if _, err := audittest.Move(t.Context(), f.store, audittest.Ref("0"), fmt.Sprint(time.Now().UnixNano()), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]int{
		"/log/tile/entries/000.p/3": 200, "/log/tile/entries/000.p/4": 404, "/log/tile/entries/000": 404,
		"/log/tile/0/000.p/3": 200, "/log/tile/0/000.p/4": 404, "/log/tile/0/000": 404, "/log/tile/1/000.p/1": 404,
		"/log/proof/2": 200, "/log/proof/3": 404, "/log/proof/-1": 400, "/log/proof/x": 400,
		"/log/tile/0/x": 400, "/log/tile/99/000": 400, "/log/tile/": 400, "/log/tile/0/000.p/0": 400,
	} {
		if status, body := f.get(t, path); status != want && status != 404 || (want == 200) != (status == 200) {
			t.Errorf("%s = %d %.200s, want %d", path, status, body, want)
		}
	}
}

// Lists come page by page, next is the value for after, and it ends.
func TestListsArePaged(t *testing.T) {
	f := serve(t, 10, "")
	var got []int64
	for after := ""; ; {
		var page admin.EventList
		_, body := f.get(t, "/api/v1/events?limit=3&order=desc"+after)
		if err := json.Unmarshal([]byte(body), &page); err != nil {
			t.Fatal(err)
		}
		for _, e := range page.Events {
			got = append(got, e.Index)
		}
		if page.Next == nil {
			break
		}
		after = fmt.Sprintf("&after=%d", *page.Next)
	}
	if fmt.Sprint(got) != "[9 8 7 6 5 4 3 2 1 0]" {
		t.Errorf("pages have %v", got)
	}
	var refs []string
	for after := ""; ; {
		var page admin.TagList
		_, body := f.get(t, "/api/v1/tags?limit=1"+after)
		if err := json.Unmarshal([]byte(body), &page); err != nil {
			t.Fatal(err)
		}
		for _, tag := range page.Tags {
			refs = append(refs, tag.Ref)
		}
		if page.Next == "" {
			break
		}
		after = "&after=" + page.Next
	}
	if fmt.Sprint(refs) != "[docker.io/library/app:0 docker.io/library/app:1 docker.io/library/app:2]" {
		t.Errorf("pages have %v", refs)
	}
}

// What is asked wrongly is told, and no filter is passed over.
func TestBadCallsAreTold(t *testing.T) {
	f := serve(t, 1, "")
	for path, want := range map[string]int{
		"/api/v1/events?held=true":       400,
		"/api/v1/events?limit=0":         400,
		"/api/v1/events?limit=many":      400,
		"/api/v1/events?limit=100000":    400,
		"/api/v1/events?type=tag.exists": 400,
		"/api/v1/events?ref=nginx":       400,
		"/api/v1/events?since=yesterday": 400,
		"/api/v1/events?order=random":    400,
		"/api/v1/events?after=x":         400,
		"/api/v1/events/9":               404,
		"/api/v1/events/x":               400,
		"/api/v1/tags?match=%5B":         400,
		"/api/v1/tags?after=x":           400,
		"/api/v1/unknown":                404,
		"/ca/internal.crt":               404,
	} {
		status, body := f.get(t, path)
		var e struct {
			Error struct{ Code, Message string }
		}
		if err := json.Unmarshal([]byte(body), &e); status != want || err != nil || e.Error.Code == "" || e.Error.Message == "" {
			t.Errorf("%s = %d %s, want %d and an error that says why", path, status, body, want)
		}
	}
	resp, err := http.Post(f.url+"/api/v1/status", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 405 && resp.StatusCode != 404 {
		t.Errorf("POST to a view = %d", resp.StatusCode)
	}
}

// With a token everything but health and the log needs it.
func TestTokenGuardsAllButHealthAndTheLog(t *testing.T) {
	f := serve(t, 1, "sesame")
	for path, open := range map[string]bool{
		"/healthz": true, "/readyz": true, "/log/checkpoint": true, "/log/vkey": true, "/log/proof/0": true, "/log/tile/0/000.p/1": true,
		"/metrics": false, "/": false, "/api/v1/status": false, "/api/v1/tags": false, "/api/v1/events": false, "/api/v1/events/0": false, "/unknown": false,
	} {
		if status, _ := f.get(t, path); (status == 200) != open || !open && status != 401 {
			t.Errorf("%s without the token = %d", path, status)
		}
		if status, _ := f.get(t, path, "Authorization: Bearer wrong"); !open && status != 401 {
			t.Errorf("%s with a wrong token = %d", path, status)
		}
		if status, _ := f.get(t, path, "Authorization: Bearer sesame"); status == 401 {
			t.Errorf("%s with the token = %d", path, status)
		}
	}
}

// Health, status and metrics have the names that others rely on, and warnings do not
// make a mirror unready.
func TestHealthStatusAndMetrics(t *testing.T) {
	f := serve(t, 5, "")
	f.warn = []string{"the disk is full"}
	if status, body := f.get(t, "/readyz"); status != 200 || body != `{"ready":true,"warnings":["the disk is full"]}`+"\n" {
		t.Errorf("/readyz = %d %s", status, body)
	}
	var s admin.Status
	_, body := f.get(t, "/api/v1/status")
	if err := json.Unmarshal([]byte(body), &s); err != nil || s.Log.Size != 5 || s.Log.SignedSize != 5 || s.Log.SignedAt == nil || s.Cache.Budget != 1<<20 || s.Upstreams[0].Name != "docker.io" || len(s.Warnings) != 1 {
		t.Errorf("status is %s, %v", body, err)
	}
	_, metrics := f.get(t, "/metrics")
	for _, want := range []string{
		`tidemark_requests_total{kind="manifest",result="hit",upstream="docker.io"} 1`,
		`tidemark_requests_total{kind="blob",result="404",upstream="docker.io"} 1`,
		`tidemark_request_seconds_count{kind="manifest"} 1`,
		`tidemark_served_bytes_total{source="hit"} 10`,
		`tidemark_upstream_requests_total{code="200",upstream="docker.io"} 1`,
		`tidemark_upstream_ratelimit_remaining{upstream="docker.io"} 42`,
		`tidemark_tag_moves_total{class="unknown",mode="observe"} 1`,
		"tidemark_cache_bytes 0", "tidemark_cache_blobs 0", "tidemark_cache_evicted_bytes_total 0", "tidemark_cache_oldest_seconds 0",
		"tidemark_fills_active 0", "tidemark_log_size 5", "tidemark_log_unsigned_seconds 0",
	} {
		if !strings.Contains(metrics, want+"\n") {
			t.Errorf("/metrics lacks %s", want)
		}
	}
}
