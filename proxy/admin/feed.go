package admin

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"tidemark/audit"
)

// Feeds are for whoever cannot be sent anything, or does not want to be: they are
// fetched. They have the newest events that are worth a look, and need no credentials
// but a token of their own, which goes into the address.

const (
	feedItems   = 50
	feedScanned = 5000 // entries that are looked through for them
)

// A feedItem is an event in a feed.
type feedItem struct {
	index int64
	leaf  []byte
	event audit.Event
	title string
	text  string
}

// feedQuery is what a feed is about.
type feedQuery struct {
	match audit.Glob
	least audit.Severity
}

func readFeedQuery(r *http.Request) (q feedQuery, err error) {
	q.least = audit.Notice
	for key, values := range r.URL.Query() {
		value := values[0]
		switch key {
		case "token":
		case "match":
			if q.match, err = globOf(value); err != nil {
				return q, err
			}
		case "min_severity":
			var ok bool
			if q.least, ok = audit.ParseSeverity(value); !ok {
				return q, badRequest("min_severity %.100q is not one of info, notice, warning, high, critical", value)
			}
		default:
			return q, badRequest("parameter %.100q is not known; a feed takes: match, min_severity, token", key)
		}
	}
	return q, nil
}

// feed finds the newest events of a query.
func (h *Handler) feed(r *http.Request) (items []feedItem, err error) {
	q, err := readFeedQuery(r)
	if err != nil {
		return nil, err
	}
	entries, err := h.o.Views.Events(r.Context(), audit.EventQuery{Descending: true, Limit: feedScanned})
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		e, err := audit.ParseLeaf(entry.Leaf)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %w", entry.Index, err)
		}
		if e.Type == audit.Snapshot || e.Severity() < q.least || e.Ref != (audit.Ref{}) && !q.match.Matches(e.Ref) {
			continue
		}
		it := feedItem{index: entry.Index, leaf: entry.Leaf, event: e}
		it.title, it.text = h.o.Describe(entry.Index, entry.Leaf, e)
		if items = append(items, it); len(items) == feedItems {
			break
		}
	}
	return items, nil
}

// base is how the client calls this address.
func base(r *http.Request) string {
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	return scheme + "://" + r.Host
}

// self is the address of the feed without the token.
func self(r *http.Request) string {
	query := r.URL.Query()
	query.Del("token")
	u := url.URL{Path: r.URL.Path, RawQuery: query.Encode()}
	return base(r) + u.String()
}

func eventURL(r *http.Request, index int64) string {
	return fmt.Sprintf("%s/api/v1/events/%d", base(r), index)
}

// updated is the time of the newest item; a feed without any is as old as the server.
func (h *Handler) updated(items []feedItem) time.Time {
	if len(items) == 0 {
		return h.o.Started.UTC().Truncate(time.Second)
	}
	return items[0].event.Time
}

// Atom (RFC 4287).
type (
	atomFeed struct {
		XMLName xml.Name    `xml:"http://www.w3.org/2005/Atom feed"`
		ID      string      `xml:"id"`
		Title   string      `xml:"title"`
		Updated string      `xml:"updated"`
		Author  string      `xml:"author>name"`
		Links   []atomLink  `xml:"link"`
		Entries []atomEntry `xml:"entry"`
	}
	atomLink struct {
		Rel  string `xml:"rel,attr,omitempty"`
		Href string `xml:"href,attr"`
	}
	atomEntry struct {
		ID         string         `xml:"id"`
		Title      string         `xml:"title"`
		Updated    string         `xml:"updated"`
		Link       atomLink       `xml:"link"`
		Categories []atomCategory `xml:"category"`
		Content    atomContent    `xml:"content"`
	}
	atomCategory struct {
		Term string `xml:"term,attr"`
	}
	atomContent struct {
		Type string `xml:"type,attr"`
		Text string `xml:",chardata"`
	}
)

func (h *Handler) feedAtom(w http.ResponseWriter, r *http.Request) {
	items, err := h.feed(r)
	if err != nil {
		writeError(w, err)
		return
	}
	f := atomFeed{
		ID: "urn:tidemark:" + url.PathEscape(h.o.Origin), Title: "tidemark " + h.o.Origin, Author: "tidemark",
		Updated: h.updated(items).Format(time.RFC3339Nano), Links: []atomLink{{"self", self(r)}},
	}
	for _, it := range items {
		f.Entries = append(f.Entries, atomEntry{
			ID: "urn:uuid:" + it.event.ID.String(), Title: printable(it.title), Updated: it.event.Time.Format(time.RFC3339Nano), Link: atomLink{Href: eventURL(r, it.index)},
			Categories: []atomCategory{{string(it.event.Type)}, {it.event.Severity().String()}}, Content: atomContent{"text", printable(it.text)},
		})
	}
	body, err := xml.MarshalIndent(f, "", " ")
	if err != nil {
		panic("admin: feed cannot be encoded: " + err.Error())
	}
	writeFeed(w, r, "application/atom+xml; charset=utf-8", append([]byte(xml.Header), body...))
}

// printable is a text without what XML cannot carry.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' && c != '\n' && c != '\t' {
			return '\uFFFD'
		}
		return c
	}, s)
}

// A jsonFeed is a JSON Feed 1.1.
type jsonFeed struct {
	Version     string         `json:"version"`
	Title       string         `json:"title"`
	HomePageURL string         `json:"home_page_url"`
	FeedURL     string         `json:"feed_url"`
	Items       []jsonFeedItem `json:"items"`
}

type jsonFeedItem struct {
	ID          string          `json:"id"`
	URL         string          `json:"url"`
	Title       string          `json:"title"`
	ContentText string          `json:"content_text"`
	Published   time.Time       `json:"date_published"`
	Tags        []string        `json:"tags"`
	Tidemark    json.RawMessage `json:"_tidemark"` // the leaf
}

func (h *Handler) feedJSON(w http.ResponseWriter, r *http.Request) {
	items, err := h.feed(r)
	if err != nil {
		writeError(w, err)
		return
	}
	f := jsonFeed{Version: "https://jsonfeed.org/version/1.1", Title: "tidemark " + h.o.Origin, HomePageURL: base(r) + "/", FeedURL: self(r), Items: []jsonFeedItem{}}
	for _, it := range items {
		f.Items = append(f.Items, jsonFeedItem{
			ID: it.event.ID.String(), URL: eventURL(r, it.index), Title: it.title, ContentText: it.text, Published: it.event.Time,
			Tags: []string{string(it.event.Type), it.event.Severity().String()}, Tidemark: it.leaf,
		})
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(f); err != nil {
		panic("admin: feed cannot be encoded: " + err.Error())
	}
	writeFeed(w, r, "application/feed+json; charset=utf-8", body.Bytes())
}

// writeFeed sends a feed, unless the reader has it.
func writeFeed(w http.ResponseWriter, r *http.Request, mediaType string, body []byte) {
	sum := sha256.Sum256(body)
	tag := `"` + hex.EncodeToString(sum[:16]) + `"`
	w.Header().Set("ETag", tag)
	w.Header().Set("Cache-Control", "no-cache")
	if slices.Contains(strings.Split(strings.ReplaceAll(r.Header.Get("If-None-Match"), " ", ""), ","), tag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Header().Set("Content-Type", mediaType)
	_, _ = w.Write(body) // a client that is gone needs no error
}
