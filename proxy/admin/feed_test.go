package admin_test

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
	"tidemark/proxy/admin"
)

// What is worth a look is in the feeds, newest first, in Atom's and JSON Feed's words,
// and only if it is asked for what there is.
func TestFeeds(t *testing.T) {
	f := serve(t, 8, "") // of three tags, the last entries are moves
	status, body := f.get(t, "/feed.atom?match=docker.io/library/app:1")
	var atom struct {
		XMLName xml.Name `xml:"http://www.w3.org/2005/Atom feed"`
		ID      string   `xml:"id"`
		Updated string   `xml:"updated"`
		Entries []struct {
			ID      string `xml:"id"`
			Title   string `xml:"title"`
			Updated string `xml:"updated"`
			Content string `xml:"content"`
			Link    struct {
				Href string `xml:"href,attr"`
			} `xml:"link"`
		} `xml:"entry"`
	}
	if err := xml.Unmarshal([]byte(body), &atom); err != nil || status != 200 || len(atom.Entries) != 2 || atom.ID == "" {
		t.Fatalf("%d %v\n%s", status, err, body)
	}
	e := atom.Entries[0]
	if e.Title != "7 docker.io/library/app:1 & <more>\uFFFD[2J" || e.Content != "in full" || !strings.HasPrefix(e.ID, "urn:uuid:") || e.Updated != atom.Updated || !strings.HasSuffix(e.Link.Href, "/api/v1/events/7") {
		t.Errorf("entry: %+v", e)
	}
	if _, err := time.Parse(time.RFC3339, e.Updated); err != nil {
		t.Error(err)
	}
	status, body = f.get(t, "/feed.json")
	var feed struct {
		Version string
		Items   []struct {
			ID       string
			Tags     []string
			Tidemark json.RawMessage `json:"_tidemark"`
		}
	}
	if err := json.Unmarshal([]byte(body), &feed); err != nil || status != 200 || feed.Version != "https://jsonfeed.org/version/1.1" || len(feed.Items) != 5 {
		t.Fatalf("%d %v\n%s", status, err, body)
	}
	if leaf, err := audit.ParseLeaf(feed.Items[0].Tidemark); err != nil || leaf.ID.String() != feed.Items[0].ID || fmt.Sprint(feed.Items[0].Tags) != "[tag.moved notice]" {
		t.Errorf("item: %+v, %v", feed.Items[0], err)
	}
	for path, want := range map[string]int{
		"/feed.json?min_severity=critical": 200, "/feed.json?min_severity=loud": 400, "/feed.json?match=nginx": 400, "/feed.atom?since=1": 400, "/feed.rss": 404,
	} {
		if status, body := f.get(t, path); status != want || want == 200 && strings.Contains(body, "in full") {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	resp, err := http.Get(f.url + "/feed.json")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if status, _ := f.get(t, "/feed.json", "If-None-Match: "+resp.Header.Get("ETag")); status != http.StatusNotModified {
		t.Errorf("the reader has it: %d", status)
	}
}

// With a token file the feeds have a token of their own, which is good for nothing else,
// and is in none of the addresses that they have.
func TestFeedToken(t *testing.T) {
	f := serve(t, 8, "secret")
	for path, want := range map[string]int{
		"/feed.atom": 401, "/feed.json?token=wrong": 401, "/feed.json?token=secret": 401, "/feed.json?token=for-readers": 200, "/feed.atom?token=for-readers": 200,
		"/api/v1/status?token=for-readers": 401, "/metrics?token=for-readers": 401,
	} {
		status, body := f.get(t, path)
		if status != want || strings.Contains(body, "for-readers") {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	if status, body := f.get(t, "/feed.atom"); status != 401 || !strings.Contains(body, "admin.feed_token_file") {
		t.Errorf("%d %s", status, body)
	}
	if status, _ := f.get(t, "/feed.json", "Authorization: Bearer secret"); status != 200 {
		t.Errorf("with the admin token: %d", status)
	}
}

// Alerts are listed and acknowledged, what is muted is listed and taken back, and each
// is an entry of the log.
func TestAlertsAndMutes(t *testing.T) {
	f := serve(t, 0, "")
	ref := audit.Ref{Upstream: "docker.io", Repository: "library/held", Tag: "1"}
	for _, name := range []string{"one", "two"} {
		f.see(t, ref, name)
	}
	list := func(query string) (out admin.Alerts) {
		t.Helper()
		status, body := f.get(t, "/api/v1/alerts"+query)
		if err := json.Unmarshal([]byte(body), &out); err != nil || status != 200 {
			t.Fatalf("%d %s", status, body)
		}
		return out
	}
	open := list("").Alerts
	if len(open) != 1 || open[0].Ref != ref.String() || open[0].Type != audit.Held || open[0].Acknowledged != nil {
		t.Fatalf("open: %+v", open)
	}
	until := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	for _, c := range []struct {
		path, body string
		status     int
	}{
		{"alerts/acknowledge", fmt.Sprintf(`{"index": %d, "reason": "known"}`, open[0].Index), 200},
		{"alerts/acknowledge", `{"index": 0}`, 404},
		{"alerts/acknowledge", `{}`, 400},
		{"mutes", fmt.Sprintf(`{"match": "docker.io/**", "until": %q, "reason": "moving"}`, until), 200},
		{"mutes", fmt.Sprintf(`{"match": "docker.io/**", "until": %q}`, until), 400},
		{"mutes", `{"match": "docker.io/**", "until": "2020-01-01T00:00:00Z", "reason": "x"}`, 400},
		{"mutes", fmt.Sprintf(`{"match": "nginx", "until": %q, "reason": "x"}`, until), 400},
		{"mutes/remove", `{"match": "ghcr.io/**"}`, 404},
	} {
		if status, body := f.post(t, "/api/v1/"+c.path, "application/json", c.body); status != c.status {
			t.Errorf("%s %s: %d %s, want %d", c.path, c.body, status, body, c.status)
		}
	}
	if a := list("").Alerts; len(a) != 1 || a[0].Acknowledged == nil {
		t.Errorf("acknowledged: %+v", a)
	}
	if status, body := f.get(t, "/api/v1/mutes"); status != 200 || !strings.Contains(body, `"reason":"moving"`) {
		t.Errorf("mutes: %d %s", status, body)
	}
	if status, body := f.post(t, "/api/v1/mutes/remove", "application/json", `{"match": "docker.io/**"}`); status != 200 {
		t.Errorf("taken back: %d %s", status, body)
	}
	if _, body := f.get(t, "/api/v1/mutes"); strings.Contains(body, "moving") {
		t.Errorf("still muted: %s", body)
	}
	f.see(t, ref, "one")
	if open, all := list("").Alerts, list("?all=true").Alerts; len(open) != 0 || len(all) != 1 || all[0].ResolvedBy != audit.Reverted {
		t.Errorf("open %+v, all %+v", open, all)
	}
	if status, _ := f.get(t, "/api/v1/alerts?all=maybe"); status != 400 {
		t.Errorf("all=maybe: %d", status)
	}
}
