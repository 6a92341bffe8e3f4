package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/distribution/reference"
	"github.com/mattn/go-isatty"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"tidemark/audit"
	"tidemark/config"
	"tidemark/proxy/admin"
)

// A client talks to the admin address of a running server.
type client struct {
	server string
	token  string
}

// defaultServer is where serve listens without a configuration.
const defaultServer = "http://127.0.0.1:5051"

// addClient adds the flags of a command that talks to a server.
func addClient(c *cobra.Command) *client {
	cl := &client{token: os.Getenv("TIDEMARK_TOKEN")}
	def := os.Getenv("TIDEMARK_SERVER")
	if def == "" {
		def = defaultServer
	}
	c.Flags().StringVar(&cl.server, "server", def, "admin address of the server, or TIDEMARK_SERVER; a token is taken from TIDEMARK_TOKEN")
	return cl
}

// addJSON adds --json.
func addJSON(c *cobra.Command) *bool {
	return c.Flags().Bool("json", false, "print JSON")
}

// maxAnswer bounds an answer of the server in bytes.
const maxAnswer = 64 << 20

// get fetches the body of a path below the admin address.
func (cl *client) get(ctx context.Context, path string, query url.Values) ([]byte, error) {
	u := strings.TrimSuffix(cl.server, "/") + path
	if len(query) > 0 {
		u += "?" + query.Encode()
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	resp, err := cl.open(ctx, http.MethodGet, u, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
}

// open sends a request, whose body is JSON, and returns the answer if it is a good one.
func (cl *client) open(ctx context.Context, method, address string, body io.Reader) (*http.Response, error) {
	return cl.send(ctx, method, address, "application/json", body)
}

func (cl *client) send(ctx context.Context, method, address, contentType string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, address, body)
	if err != nil || req.URL.Scheme != "http" && req.URL.Scheme != "https" || req.URL.Host == "" {
		return nil, usage(fmt.Errorf("--server %q is not an address such as %s", cl.server, defaultServer))
	}
	if cl.token != "" {
		req.Header.Set("Authorization", "Bearer "+cl.token)
	}
	if body != nil {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("no answer from the server; is it running, and is --server right? %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	var e struct{ Error admin.Error }
	if json.Unmarshal(answer, &e) == nil && e.Error.Message != "" {
		return nil, &refusedError{cl.server, e.Error.Code, e.Error.Message}
	}
	return nil, fmt.Errorf("%s: %s; is --server the admin address, such as %s?", req.URL.Redacted(), resp.Status, defaultServer)
}

// A refusedError is an answer of the API that is an error.
type refusedError struct{ server, code, message string }

func (e *refusedError) Error() string { return e.server + ": " + e.message }

// postTime bounds a call that changes or computes something: a replay of years
// of history takes a while.
const postTime = 10 * time.Minute

// postJSON calls the API with in, and decodes the answer into out.
func (cl *client) postJSON(ctx context.Context, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, postTime)
	defer cancel()
	resp, err := cl.open(ctx, http.MethodPost, strings.TrimSuffix(cl.server, "/")+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("%s%s: %w", cl.server, path, err)
	}
	return nil
}

// getJSON decodes an answer of the API into v.
func (cl *client) getJSON(ctx context.Context, path string, query url.Values, v any) error {
	body, err := cl.get(ctx, path, query)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("%s%s: %w", cl.server, path, err)
	}
	return nil
}

func printJSON(c *cobra.Command, v any) error {
	enc := json.NewEncoder(c.OutOrStdout())
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func isTerminal(f *os.File) bool { return isatty.IsTerminal(f.Fd()) }

// expandRef reads a REF as Docker does: nginx is docker.io/library/nginx:latest.
func expandRef(s string) (audit.Ref, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return audit.Ref{}, usage(fmt.Errorf("%q is not an image reference: %w", s, err))
	}
	if _, ok := named.(reference.Digested); ok {
		return audit.Ref{}, usage(fmt.Errorf("%q names a digest; the ledger is about tags", s))
	}
	tagged := reference.TagNameOnly(named).(reference.NamedTagged)
	return audit.Ref{Upstream: reference.Domain(named), Repository: reference.Path(named), Tag: tagged.Tag()}, nil
}

// expandPattern makes a pattern of what may be a short name: nginx stands for
// all tags of docker.io/library/nginx.
func expandPattern(s string) (string, error) {
	if strings.ContainsAny(s, "*?") {
		return s, nil
	}
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return "", usage(fmt.Errorf("%q is neither an image reference nor a pattern: %w", s, err))
	}
	if _, ok := named.(reference.Tagged); ok {
		return named.String(), nil
	}
	return named.Name() + ":*", nil
}

// ago reads a duration before now, such as 24h or 30d, or a time.
func ago(s string, now time.Time) (string, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t.UTC().Format(time.RFC3339), nil
	}
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t.Format(time.RFC3339), nil
	}
	d, err := config.ParseDuration(s)
	if err != nil {
		return "", usage(errors.New(err.Error() + ", a date or a time"))
	}
	return now.Add(-time.Duration(d)).UTC().Format(time.RFC3339), nil
}

// parseIndex reads the index of an entry of the log.
func parseIndex(s string) (int64, error) {
	index, err := strconv.ParseInt(s, 10, 64)
	if err != nil || index < 0 {
		return 0, usage(fmt.Errorf("%q is not the index of an event", s))
	}
	return index, nil
}

// printable is a text that is not ours as a terminal may have it: what would move
// the cursor, or hide what follows, is quoted.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// short is a digest as far as people compare it.
func short(d digest.Digest) string {
	if d.Validate() != nil {
		return string(d)
	}
	return d.Algorithm().String() + ":" + d.Encoded()[:12]
}

// since says how long ago t was, in one unit.
func since(t, now time.Time) string {
	d := now.Sub(t)
	for _, u := range []struct {
		name string
		unit time.Duration
	}{{"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}} {
		if n := d / u.unit; n > 0 {
			return fmt.Sprintf("%d%s ago", n, u.name)
		}
	}
	return fmt.Sprintf("%ds ago", max(0, d/time.Second))
}
