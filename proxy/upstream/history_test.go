package upstream_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tidemark/proxy/upstream"
)

const (
	digestA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	digestB = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// A teller is a registry that answers paths with what it is told to.
type teller struct {
	*httptest.Server
	answers map[string]string // by path and query
	link    map[string]string
	html    bool
	asked   atomic.Int64
}

func newTeller(t *testing.T, answers map[string]string) *teller {
	t.Helper()
	s := &teller{answers: answers, link: make(map[string]string)}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		answer, ok := s.answers[r.URL.RequestURI()]
		switch {
		case s.html:
			w.Header().Set("Content-Type", "text/html")
			fmt.Fprint(w, "<html>welcome</html>")
		case !ok:
			http.Error(w, `{"errors":[{"code":"NAME_UNKNOWN","message":"no"}]}`, http.StatusNotFound)
		default:
			w.Header().Set("Content-Type", "application/json")
			if l := s.link[r.URL.RequestURI()]; l != "" {
				w.Header().Set("Link", l)
			}
			fmt.Fprint(w, answer)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *teller) history(t *testing.T, kind string) ([]upstream.Asserted, string, error) {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	return upstream.New(upstream.Options{Name: "there", Endpoints: []*url.URL{u}}).TagHistory(t.Context(), "org/app", "1", kind)
}

func at(s string) time.Time {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		panic(err)
	}
	return t
}

func descriptorAt(digest, created, more string) string {
	return fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":7,"annotations":{"org.opencontainers.tag.created":%q%s}}`, digest, created, more)
}

func event(digest, at, what string) string {
	return strings.Replace(descriptorAt(digest, at, `,"org.opencontainers.distribution.tag.event":"`+what+`"`), "opencontainers.tag.created", "opencontainers.distribution.tag.timestamp", 1)
}

const (
	quayPage       = "/api/v1/repository/org/app/tag/?limit=100&onlyActiveTags=false&page=%d&specificTag=1"
	ociPath        = "/v2/org/app/_oci/tag-history/1"
	tidemarkPath   = "/v2/org/app/_tidemark/tag-history/1"
	chainguardPath = "/v2/org/app/_chainguard/history/1"
)

// Upstreams tell of the past of their tags in several ways, page by page; it comes out
// the same: oldest first, each stretch with its end.
func TestTagHistories(t *testing.T) {
	index := func(descriptors ...string) string {
		return `{"schemaVersion":2,"manifests":[` + strings.Join(descriptors, ",") + `]}`
	}
	newer, older := descriptorAt(digestB, "2026-02-01T00:00:00Z", ""), descriptorAt(digestA, "2026-01-01T00:00:00Z", "")
	for name, tt := range map[string]struct {
		kind, source string
		answers      map[string]string
		link         map[string]string
		asked        int64
	}{
		"the proposal": {upstream.HistoryOCI, "_oci/tag-history", map[string]string{ociPath: index(newer, older)}, nil, 1},
		"another tidemark, in pages": {upstream.HistoryOCI, "_tidemark/tag-history",
			map[string]string{tidemarkPath: index(newer), tidemarkPath + "?last=1&n=1": index(descriptorAt(digestA, "2026-01-01T00:00:00Z", `,"dev.tidemark.tag.ended":"2026-02-01T00:00:00Z"`))},
			map[string]string{tidemarkPath: `<` + tidemarkPath + `?n=1&last=1>; rel="next"`}, 3},
		"quay, in pages": {upstream.HistoryQuay, "quay", map[string]string{
			fmt.Sprintf(quayPage, 1): `{"tags":[{"name":"1","manifest_digest":"` + digestB + `","start_ts":1769904000}],"has_additional":true}`,
			fmt.Sprintf(quayPage, 2): `{"tags":[{"name":"1","manifest_digest":"` + digestA + `","start_ts":1767225600,"end_ts":1769904000}],"has_additional":false}`,
		}, nil, 2},
		"the proposal, with events": {upstream.HistoryOCI, "_oci/tag-history", map[string]string{ociPath: index(
			event(digestB, "2026-02-01T00:00:00Z", "created"), event(digestA, "2026-02-01T00:00:00Z", "deleted"), event(digestA, "2026-01-01T00:00:00Z", "created"),
			event(digestB, "2025-12-01T00:00:00Z", "deleted"))}, nil, 1},
		"the proposal, with a deletion as its drafts had it": {upstream.HistoryOCI, "_oci/tag-history", map[string]string{ociPath: index(
			newer, strings.Replace(descriptorAt(digestA, "2026-02-01T00:00:00Z", ""), "tag.created", "tag.deleted", 1), older)}, nil, 1},
		"quay, to expire": {upstream.HistoryQuay, "quay", map[string]string{
			fmt.Sprintf(quayPage, 1): `{"tags":[{"name":"1","manifest_digest":"` + digestB + `","start_ts":1769904000,"end_ts":32503680000},{"name":"1","manifest_digest":"` + digestA + `","start_ts":1767225600,"end_ts":1769904000}]}`,
		}, nil, 1},
		"chainguard": {upstream.HistoryChainguard, "_chainguard/history", map[string]string{
			chainguardPath: `{"history":[{"updateTimestamp":"2026-01-01T00:00:00Z","digest":"` + digestA + `"},{"updateTimestamp":"2026-02-01T00:00:00Z","digest":"` + digestB + `"}]}`,
		}, nil, 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newTeller(t, tt.answers)
			s.link = tt.link
			told, source, err := s.history(t, tt.kind)
			if err != nil || source != tt.source || len(told) != 2 {
				t.Fatalf("%+v by %q, %v", told, source, err)
			}
			a, b := told[0], told[1]
			if a.Digest != digestA || !a.From.Equal(at("2026-01-01T00:00:00Z")) || !a.Until.Equal(at("2026-02-01T00:00:00Z")) {
				t.Errorf("first %+v", a)
			}
			if b.Digest != digestB || !b.From.Equal(a.Until) || !b.Until.IsZero() {
				t.Errorf("then %+v", b)
			}
			if n := s.asked.Load(); n != tt.asked {
				t.Errorf("it was asked %d times, want %d", n, tt.asked)
			}
		})
	}
}

// A registry that tells nothing of the past is told from one that tells nonsense.
func TestTagHistoriesThatAreNone(t *testing.T) {
	for _, kind := range []string{upstream.HistoryOCI, upstream.HistoryQuay, upstream.HistoryChainguard, "other"} {
		if _, _, err := newTeller(t, nil).history(t, kind); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s, not there: %v", kind, err)
		}
		page := newTeller(t, nil)
		page.html = true
		if _, _, err := page.history(t, kind); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s, a page for people: %v", kind, err)
		}
	}
	quay := func(tag string) map[string]string {
		return map[string]string{fmt.Sprintf(quayPage, 1): `{"tags":[` + tag + `]}`}
	}
	chainguard := func(entries string) map[string]string {
		return map[string]string{chainguardPath: `{"history":[` + entries + `]}`}
	}
	oci := func(descriptors ...string) map[string]string {
		return map[string]string{ociPath: `{"manifests":[` + strings.Join(descriptors, ",") + `]}`}
	}
	for name, tt := range map[string]struct {
		kind    string
		answers map[string]string
	}{
		"no JSON":              {upstream.HistoryQuay, map[string]string{fmt.Sprintf(quayPage, 1): `{`}},
		"no digest":            {upstream.HistoryQuay, quay(`{"name":"1","manifest_digest":"x","start_ts":1}`)},
		"another tag":          {upstream.HistoryQuay, quay(`{"name":"2","manifest_digest":"` + digestA + `","start_ts":1}`)},
		"before all times":     {upstream.HistoryQuay, quay(`{"name":"1","manifest_digest":"` + digestA + `","start_ts":-1}`)},
		"it ends before":       {upstream.HistoryQuay, quay(`{"name":"1","manifest_digest":"` + digestA + `","start_ts":2000,"end_ts":1000}`)},
		"in the future":        {upstream.HistoryChainguard, chainguard(`{"updateTimestamp":"2999-01-01T00:00:00Z","digest":"` + digestA + `"}`)},
		"no time":              {upstream.HistoryChainguard, chainguard(`{"updateTimestamp":"monday","digest":"` + digestA + `"}`)},
		"no digest there":      {upstream.HistoryChainguard, chainguard(`{"updateTimestamp":"2026-01-01T00:00:00Z"}`)},
		"without a time":       {upstream.HistoryOCI, oci(`{"digest":"` + digestA + `"}`)},
		"deleted, not meant":   {upstream.HistoryOCI, oci(event(digestB, "2026-02-01T00:00:00Z", "deleted"), event(digestA, "2026-01-01T00:00:00Z", "created"))},
		"an unknown event":     {upstream.HistoryOCI, oci(event(digestA, "2026-01-01T00:00:00Z", "moved"))},
		"it ends tomorrow":     {upstream.HistoryOCI, oci(descriptorAt(digestA, "2026-01-01T00:00:00Z", `,"dev.tidemark.tag.ended":"2999-01-01T00:00:00Z"`))},
		"both at once":         {upstream.HistoryOCI, oci(descriptorAt(digestA, "2026-01-01T00:00:00Z", ""), descriptorAt(digestB, "2026-02-01T00:00:00Z", ""))},
		"a digest of nonsense": {upstream.HistoryOCI, oci(descriptorAt("sha256:x", "2026-01-01T00:00:00Z", ""))},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := newTeller(t, tt.answers).history(t, tt.kind)
			var e *upstream.Error
			if !errors.As(err, &e) || !e.Nonsense || errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("%v, want it to be called nonsense", err)
			}
		})
	}
}

// What was pushed twice within a second has two stretches, of which the first is empty.
func TestTagHistoryOfTwoAtOnce(t *testing.T) {
	for kind, answers := range map[string]map[string]string{
		upstream.HistoryQuay: {fmt.Sprintf(quayPage, 1): `{"tags":[{"name":"1","manifest_digest":"` + digestB + `","start_ts":1769904000},{"name":"1","manifest_digest":"` + digestA + `","start_ts":1769904000,"end_ts":1769904000}]}`},
		upstream.HistoryOCI:  {ociPath: `{"manifests":[` + descriptorAt(digestB, "2026-02-01T00:00:00Z", "") + "," + descriptorAt(digestA, "2026-02-01T00:00:00Z", "") + `]}`},
	} {
		told, _, err := newTeller(t, answers).history(t, kind)
		if err != nil || len(told) != 2 || told[0].Digest != digestA || !told[0].Until.Equal(told[0].From) || told[1].Digest != digestB || !told[1].Until.IsZero() {
			t.Errorf("%s: %+v, %v", kind, told, err)
		}
	}
}

// Chainguard tells of the oldest thousand at once. What is after them is asked for: the
// last of a page is not what the tag means today.
func TestTagHistoryOfChainguardGoesOn(t *testing.T) {
	entry := func(i int) string {
		return fmt.Sprintf(`{"updateTimestamp":%q,"digest":"sha256:%064x"}`, at("2024-01-01T00:00:00Z").Add(time.Duration(i)*time.Hour).Format(time.RFC3339), i)
	}
	var page []string
	for i := range 1000 {
		page = append(page, entry(i))
	}
	start := "?" + url.Values{"start": {"2024-02-11T15:00:00Z"}}.Encode()
	s := newTeller(t, map[string]string{
		chainguardPath:         `{"history":[` + strings.Join(page, ",") + `]}`,
		chainguardPath + start: `{"history":[` + entry(999) + "," + entry(1000) + `]}`,
	})
	told, _, err := s.history(t, upstream.HistoryChainguard)
	if err != nil || len(told) != 1001 || s.asked.Load() != 2 {
		t.Fatalf("%d stretches, %v, asked %d times; want 1001 and 2", len(told), err, s.asked.Load())
	}
	if a, b := told[999], told[1000]; a.Until != b.From || !b.Until.IsZero() {
		t.Errorf("at the end %+v and %+v", a, b)
	}
	s.answers[chainguardPath+start] = s.answers[chainguardPath] // it does not know start
	if _, _, err := s.history(t, upstream.HistoryChainguard); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("the same again: %v", err)
	}
}

// A list goes on where it is, and nowhere twice.
func TestTagHistoryLinks(t *testing.T) {
	for link, asked := range map[string]int64{
		"http://elsewhere.example" + ociPath + "?n=1": 1,
		"//elsewhere.example" + ociPath + "?n=1":      1,
		"/v2/org/other/_oci/tag-history/1?n=1":        1,
		"?n=1":                                        2, // and from there to itself
	} {
		s := newTeller(t, map[string]string{ociPath: `{"manifests":[]}`, ociPath + "?n=1": `{"manifests":[]}`})
		s.link[ociPath], s.link[ociPath+"?n=1"] = "<"+link+`>; rel="next"`, "<"+link+`>; rel="next"`
		_, _, err := s.history(t, upstream.HistoryOCI)
		var e *upstream.Error
		if !errors.As(err, &e) || !e.Nonsense || s.asked.Load() != asked {
			t.Errorf("%s: %v after %d pages, want nonsense after %d", link, err, s.asked.Load(), asked)
		}
	}
}

// A registry that says that it does not do this is told from one that never saw the tag.
func TestTagHistoryUnofferedOrUnknown(t *testing.T) {
	for _, tt := range []struct {
		status  int
		code    string
		offered bool
	}{
		{http.StatusBadRequest, "UNSUPPORTED", false},
		{http.StatusMethodNotAllowed, "", false},
		{http.StatusNotImplemented, "", false},
		{http.StatusNotFound, "NAME_UNKNOWN", false}, // of a path that it takes for a name
		{http.StatusNotFound, "MANIFEST_UNKNOWN", true},
		{http.StatusForbidden, "DENIED", true},
	} {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.HasPrefix(r.URL.Path, "/v2/org/app/_tidemark/") && tt.status != http.StatusForbidden {
				http.NotFound(w, r)
				return
			}
			w.WriteHeader(tt.status)
			fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"no"}]}`, tt.code)
		}))
		_, _, err := (&teller{Server: s}).history(t, upstream.HistoryOCI)
		s.Close()
		if err == nil || errors.Is(err, errors.ErrUnsupported) == tt.offered {
			t.Errorf("%d %s: %v, offered should be %v", tt.status, tt.code, err, tt.offered)
		}
	}
}

// A list without end is not read to its end.
func TestTagHistoriesAreBounded(t *testing.T) {
	s := newTeller(t, map[string]string{ociPath: `{"manifests":[]}`})
	s.link[ociPath] = `<?n=0>; rel="next"`
	for i := range 200 {
		page := fmt.Sprintf("%s?n=%d", ociPath, i)
		s.answers[page], s.link[page] = `{"manifests":[]}`, fmt.Sprintf(`<?n=%d>; rel="next"`, i+1)
	}
	if _, _, err := s.history(t, upstream.HistoryOCI); err == nil || !strings.Contains(err.Error(), "too long") || s.asked.Load() != 50 {
		t.Errorf("%v after %d pages, want it to be too long after 50", err, s.asked.Load())
	}
	pages := make(map[string]string)
	for i := range 200 {
		pages[fmt.Sprintf(quayPage, i)] = `{"tags":[{"name":"1","manifest_digest":"` + digestA + `","start_ts":1000,"end_ts":1000}],"has_additional":true}`
	}
	s = newTeller(t, pages)
	if _, _, err := s.history(t, upstream.HistoryQuay); err == nil || !strings.Contains(err.Error(), "too long") || s.asked.Load() > 100 {
		t.Errorf("quay: %v after %d pages", err, s.asked.Load())
	}
	s = newTeller(t, map[string]string{chainguardPath: `{"history":[` + strings.Repeat(" ", 5<<20) + `]}`})
	if _, _, err := s.history(t, upstream.HistoryChainguard); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("a page without end: %v", err)
	}
}

// Offline nobody is asked.
func TestNoTagHistoryOffline(t *testing.T) {
	s := newTeller(t, nil)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = upstream.New(upstream.Options{Name: "there", Endpoints: []*url.URL{u}, Offline: true}).TagHistory(t.Context(), "org/app", "1", upstream.HistoryQuay)
	if !errors.Is(err, upstream.ErrOffline) || s.asked.Load() != 0 {
		t.Errorf("%v, asked %d times", err, s.asked.Load())
	}
}

// Quay's API gets no credentials, and what it refuses is not refused of the registry.
func TestQuaysAPIIsNoPartOfTheRegistry(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasPrefix(r.URL.Path, "/api/"):
			if r.Header.Get("Authorization") != "" {
				t.Errorf("it got %q", r.Header.Get("Authorization"))
			}
			w.WriteHeader(http.StatusUnauthorized)
		case r.Header.Get("Authorization") == "":
			w.Header().Set("Www-Authenticate", `Basic realm="registry"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer srv.Close()
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	up := upstream.New(upstream.Options{Name: "there", Endpoints: []*url.URL{u}, Credentials: upstream.Static("user", "password")})
	for range 2 {
		if err := up.Ping(t.Context()); err != nil {
			t.Errorf("the registry: %v", err)
		}
		if _, _, err := up.TagHistory(t.Context(), "org/app", "1", upstream.HistoryQuay); err == nil {
			t.Error("it told something to nobody")
		}
	}
}
