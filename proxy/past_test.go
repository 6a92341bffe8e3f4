package proxy_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/cache"
	"tidemark/proxy/upstream/upstreamtest"
)

// moves lets app:1 be a at noon, b an hour later and c another hour later, each pulled.
func moves(t *testing.T, s settings) (m *mirror, imgs []upstreamtest.Image, clk *clock) {
	t.Helper()
	clk = newClock()
	s.now = clk.Now
	m = newMirror(t, s)
	for i, name := range []string{"a", "b", "c"} {
		if i > 0 {
			clk.advance(time.Hour)
		}
		img := upstreamtest.NewImage(name)
		m.hub.Push("library/app", "1", img)
		m.pull("app", "1", img)
		imgs = append(imgs, img)
	}
	clk.advance(time.Minute)
	m.settled()
	return m, imgs, clk
}

// A tag is pulled as of a time or a place in the log, by a name or below a mirror's
// base path, with the same bytes as then and without asking upstream; the answer says
// how long that was so, and by whose word.
func TestPullsAsOf(t *testing.T) {
	m, imgs, _ := moves(t, settings{})
	events := len(audittest.Check(t, m.store))
	m.hub.Reset()
	for _, tt := range []struct {
		point string
		want  int
		until string
	}{
		{"asof/2026-07-01t12-00-00z", 0, "2026-07-01T13:00:00Z"}, {"asof/2026-07-01t12-59-59z", 0, "2026-07-01T13:00:00Z"},
		{"asof/2026-07-01t13-00-00z", 1, "2026-07-01T14:00:00Z"}, {"asof/2026-07-01t14-00-30z", 2, ""},
		{"at/0", 0, "2026-07-01T13:00:00Z"}, {"at/1", 1, "2026-07-01T14:00:00Z"}, {"at/2", 2, ""},
	} {
		img := imgs[tt.want]
		for _, prefix := range []string{"/v2/" + tt.point + "/library/app/", "/v2/" + tt.point + "/app/", "/v2/" + tt.point + "/docker.io/library/app/", "/" + tt.point + "/v2/library/app/", "/" + tt.point + "/v2/docker.io/library/app/"} {
			for _, method := range []string{"HEAD", "GET"} {
				a := m.do(method, prefix+"manifests/1")
				if a.status != 200 || a.header.Get("Docker-Content-Digest") != img.Manifest.Digest.String() || method == "GET" && string(a.body) != string(img.Manifest.Body) {
					t.Errorf("%s %smanifests/1: %d %v %s", method, prefix, a.status, a.header, a.body)
				}
				if got := a.header.Get("Tidemark-Log-Index"); got != fmt.Sprint(tt.want) {
					t.Errorf("%s: index %s", prefix, got)
				}
				from := fmt.Sprintf("2026-07-01T%d:00:00Z", 12+tt.want)
				if h := a.header; h.Get("Tidemark-Valid-From") != from || h.Get("Tidemark-Valid-Until") != tt.until || h.Get("Tidemark-Basis") != audit.Observed {
					t.Errorf("%s: %v, want from %s until %s", prefix, h, from, tt.until)
				}
			}
			for _, c := range append([]upstreamtest.Content{img.Config}, img.Layers...) {
				if b := m.get(prefix + "blobs/" + c.Digest.String()); string(b.body) != string(c.Body) {
					t.Errorf("%sblobs: %d", prefix, b.status)
				}
			}
			if a := m.get(prefix + "manifests/" + img.Manifest.Digest.String()); a.status != 200 {
				t.Errorf("%s by digest: %d", prefix, a.status)
			}
			if a := m.get(prefix + "tags/list"); a.status != 200 || !strings.Contains(string(a.body), `"tags":["1"]`) {
				t.Errorf("%stags/list: %d %s", prefix, a.status, a.body)
			}
		}
	}
	if asked := m.hub.Requests(); len(asked) != 0 {
		t.Errorf("upstream was asked %v", asked)
	}
	if n := len(audittest.Check(t, m.store)); n != events {
		t.Errorf("looking at the past made %d events", n-events)
	}
}

// What was not, is not; what makes no sense is refused; nothing of the past can be
// changed; and each says so in a way that helps.
func TestThePastRefuses(t *testing.T) {
	m, _, _ := moves(t, settings{push: true})
	m.hub.Reset()
	for _, tt := range []struct {
		method, path string
		status       int
		code, says   string
	}{
		{"GET", "/v2/asof/2026-07-01/library/app/manifests/1", 404, "MANIFEST_UNKNOWN", `"earliest":"2026-07-01T12:00:00Z"`},
		{"GET", "/v2/asof/2027-07-01/library/app/manifests/1", 404, "MANIFEST_UNKNOWN", "yet to come"},
		{"GET", "/v2/at/3/library/app/manifests/1", 404, "MANIFEST_UNKNOWN", "yet to come"},
		{"GET", "/v2/at/0/library/never/manifests/1", 404, "MANIFEST_UNKNOWN", "before it was first seen"},
		{"GET", "/v2/asof/2026-07-01/library/app/tags/list", 404, "NAME_UNKNOWN", "2026-07-01"},
		{"GET", "/v2/asof/yesterday/library/app/manifests/1", 400, "NAME_INVALID", "2026-07-01t12-30-00z"},
		{"GET", "/v2/asof/2026-13-01/library/app/manifests/1", 400, "NAME_INVALID", ""},
		{"GET", "/v2/at/-1/library/app/manifests/1", 400, "NAME_INVALID", "index"},
		{"GET", "/v2/at/01/library/app/manifests/1", 400, "NAME_INVALID", "index"},
		{"GET", "/asof/x/v2/library/app/manifests/1", 400, "NAME_INVALID", ""},
		{"GET", "/at/0/v2/at/1/library/app/manifests/1", 404, "", ""},
		{"PUT", "/v2/at/0/library/app/manifests/1", 405, "UNSUPPORTED", "can only be read"},
		{"POST", "/asof/2026-07-02/v2/library/app/blobs/uploads/", 405, "UNSUPPORTED", "can only be read"},
		{"DELETE", "/v2/asof/2026-07-02/library/app/manifests/1", 405, "UNSUPPORTED", "can only be read"},
	} {
		a := m.do(tt.method, tt.path)
		if a.status != tt.status || tt.code != "" && a.code(t) != tt.code || !strings.Contains(string(a.body), tt.says) {
			t.Errorf("%s %s: %d %s, want %d %s %q", tt.method, tt.path, a.status, a.body, tt.status, tt.code, tt.says)
		}
	}
	for _, q := range m.hub.Requests() {
		if q.Method != "GET" && q.Method != "HEAD" {
			t.Errorf("upstream was asked %v", q)
		}
	}
}

// Where the request says which upstream is meant, a name that begins like a view is a
// name: upstream may have such repositories.
func TestANameThatLooksLikeAView(t *testing.T) {
	m, _, _ := moves(t, settings{})
	img := upstreamtest.NewImage("odd")
	m.ghcr.Push("asof/2026-07-01/app", "1", img)
	for path, headers := range map[string][]string{
		"/v2/asof/2026-07-01/app/manifests/1?ns=ghcr.io":   nil,
		"/v2/asof/2026-07-01/app/manifests/1":              {"Host: mirror.test"},
		"/v2/ghcr.io/asof/2026-07-01/app/manifests/1":      nil,
		"/at/2/v2/ghcr.io/asof/2026-07-01/app/manifests/1": nil,
	} {
		a := m.get(path, headers...)
		want := 200
		if strings.HasPrefix(path, "/at/") {
			want = 404 // it was never seen by then
		}
		if a.status != want {
			t.Errorf("%s %v: %d %s", path, headers, a.status, a.body)
		}
	}
}

// A listener that is bound to a moment answers every request as of then.
func TestAViewIsBoundToAMoment(t *testing.T) {
	m, imgs, _ := moves(t, settings{})
	now := m.url
	m.url = m.view(audit.AtTime(time.Date(2026, 7, 1, 13, 30, 0, 0, time.UTC)))
	m.pull("app", "1", imgs[1])
	if a := m.get("/v2/at/0/library/app/manifests/1"); a.status != 400 || !strings.Contains(string(a.body), "bound") {
		t.Errorf("another moment: %d %s", a.status, a.body)
	}
	if a := m.get("/v2/"); a.status != 200 {
		t.Errorf("/v2/: %d", a.status)
	}
	if a := m.get("/v2/library/app/_tidemark/tag-history/1"); strings.Contains(string(a.body), imgs[2].Manifest.Digest.String()) || !strings.Contains(string(a.body), imgs[1].Manifest.Digest.String()) {
		t.Errorf("the history at that time: %s", a.body)
	}
	m.url = now
	m.pull("app", "1", imgs[2])
}

// What a rule held back then was not served then, and is not now; what is denied now is
// denied for the past.
func TestThePastOfWhatIsHeld(t *testing.T) {
	clk := newClock()
	m := newMirror(t, settings{now: clk.Now, policy: policy(t, holdAll)})
	a, b := upstreamtest.NewImage("a"), upstreamtest.NewImage("b")
	m.hub.Push("library/app", "1", a)
	m.pull("app", "1", a)
	clk.advance(time.Hour)
	m.hub.Push("library/app", "1", b)
	m.pull("app", "1", a)
	clk.advance(time.Hour)
	if got := m.get("/v2/asof/2026-07-01t13-30-00z/app/manifests/1"); got.header.Get("Docker-Content-Digest") != a.Manifest.Digest.String() {
		t.Errorf("a way around the hold: %d %v", got.status, got.header)
	}
	if err := m.ledger.SetPolicy(t.Context(), policy(t, audit.RuleText{Match: "**", Mode: audit.Deny}), "test"); err != nil {
		t.Fatal(err)
	}
	if got := m.get("/v2/asof/2026-07-01t13-30-00z/app/manifests/1"); got.status != 403 && got.status != 404 {
		t.Errorf("what is denied: %d %s", got.status, got.body)
	}
}

// An uncertain time is told or, by configuration, refused.
func TestGapsAreToldOrRefused(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		m, imgs, _ := moves(t, settings{refuseGaps: refuse})
		certain := m.get("/v2/asof/2026-07-01t13-00-00z/app/manifests/1")
		if certain.status != 200 || certain.header.Get("Tidemark-Warning") != "" {
			t.Errorf("a certain time: %d %v", certain.status, certain.header)
		}
		a := m.get("/v2/asof/2026-07-01t13-59-00z/app/manifests/1") // 59 minutes after the last look
		switch {
		case refuse && (a.status != 404 || !strings.Contains(string(a.body), "audit.gaps")):
			t.Errorf("refused: %d %s", a.status, a.body)
		case !refuse && (a.status != 200 || a.header.Get("Docker-Content-Digest") != imgs[1].Manifest.Digest.String() || a.header.Get("Tidemark-Warning") == ""):
			t.Errorf("told: %d %v", a.status, a.header)
		}
	}
}

// Bytes that went to make room come back by digest, from an upstream that still has
// them.
func TestBytesOfThePastComeBack(t *testing.T) {
	m, imgs, _ := moves(t, settings{})
	for _, c := range append([]upstreamtest.Content{imgs[0].Manifest, imgs[0].Config}, imgs[0].Layers...) {
		if err := m.cache.Remove(c.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if m.cache.Presence(imgs[0].Manifest.Digest) != cache.Gone {
		t.Fatal("it is not gone")
	}
	a := m.get("/v2/at/0/app/manifests/1")
	b := m.get("/v2/at/0/app/blobs/" + imgs[0].Layers[0].Digest.String())
	if a.status != 200 || b.status != 200 || string(b.body) != string(imgs[0].Layers[0].Body) {
		t.Errorf("%d %s, %d", a.status, a.body, b.status)
	}
}

// Offline nobody is asked for anything, and what is here is answered at once: tags,
// manifests, blobs, the list of tags, what refers to an image, also after a restart;
// and what is not here is said not to be, and why.
func TestOfflineNobodyIsAsked(t *testing.T) {
	dir := t.TempDir()
	m := newMirror(t, settings{dir: dir})
	img := upstreamtest.NewImage("layer")
	m.hub.Push("library/app", "1", img)
	m.hub.Push("library/app", "2", upstreamtest.NewImage("other"))
	sig := artifact("signature")
	m.hub.Refer("library/app", img.Manifest.Digest, "application/sig", sig)
	m.pull("app", "1", img)
	m.referrers(img.Manifest.Digest, "")
	if a := m.get("/v2/library/app/manifests/" + sig.Digest.String()); a.status != 200 {
		t.Fatalf("the signature: %d", a.status)
	}
	m.settled()
	m.start(settings{dir: dir, offline: true})
	m.hub.Reset()
	began := time.Now()
	m.pull("app", "1", img)
	if got, _ := m.referrers(img.Manifest.Digest, ""); !slices.Equal(got, []string{sig.Digest.String()}) {
		t.Errorf("what refers to it: %v", got)
	}
	if a := m.get("/v2/library/app/tags/list"); a.status != 200 || !strings.Contains(string(a.body), `"tags":["1"]`) || !strings.Contains(a.header.Get("Cache-Status"), "stale") {
		t.Errorf("tags: %d %v %s", a.status, a.header, a.body)
	}
	for path, code := range map[string]string{
		"/v2/library/app/manifests/2": "MANIFEST_UNKNOWN", "/v2/library/app/manifests/" + cacheTestDigest: "MANIFEST_UNKNOWN",
		"/v2/library/app/blobs/" + cacheTestDigest: "BLOB_UNKNOWN", "/v2/library/never/tags/list": "NAME_UNKNOWN",
	} {
		a := m.get(path)
		if a.status != http.StatusNotFound || a.code(t) != code || !strings.Contains(string(a.body), `"offline":true`) {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
	if asked := m.hub.Requests(); len(asked) != 0 {
		t.Errorf("upstream was asked %v", asked)
	}
}

const cacheTestDigest = "sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
