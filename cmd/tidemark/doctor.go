package main

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tidemark/proxy/admin"
)

// A finding is one thing that doctor looked at.
type finding struct {
	What string `json:"what"`
	OK   bool   `json:"ok"`
	Says string `json:"says"`
	Note bool   `json:"note,omitempty"` // nothing is wrong, but somebody should know
}

func good(what, format string, args ...any) finding {
	return finding{What: what, OK: true, Says: fmt.Sprintf(format, args...)}
}

func bad(what, format string, args ...any) finding {
	return finding{What: what, Says: fmt.Sprintf(format, args...)}
}

func remark(what, format string, args ...any) finding {
	return finding{What: what, OK: true, Note: true, Says: fmt.Sprintf(format, args...)}
}

// A doctor looks at a server from where a client is.
type doctor struct {
	*client
	registry string // address of the registry as clients have it, "" as the server says
	root     string // of the clients' files
	image    string // "" for none
}

func newDoctor() *cobra.Command {
	c := &cobra.Command{
		Use:   "doctor [IMAGE]",
		Short: "Tell what is wrong, or would go wrong, with a server and its clients",
		Long: `Look at a server from the outside in, from the machine of a client or its own: the
name and the port of the registry, TLS as a client sees it, the proxy, what the
server warns of, its log, disk and clock, every upstream with and without
credentials and what is left of its rate limit, and IMAGE if one is named. Then
look at the clients that are set up on this machine, and whether they can get past
what is held or denied. Exit code 1 if something is wrong.`,
		Example: `  tidemark doctor
  tidemark doctor nginx:1.27 --server http://mirror.example:5051`,
		Args: cobra.MaximumNArgs(1),
	}
	d := &doctor{client: addClient(c)}
	asJSON := addJSON(c)
	c.Flags().StringVar(&d.registry, "registry", "", "address of the registry as clients have it, if it is another than the server says")
	c.Flags().StringVar(&d.root, "root", "/", "folder that the paths of the clients' files begin at")
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 1 {
			ref, err := expandRef(args[0])
			if err != nil {
				return usage(err)
			}
			d.image = ref.String()
		}
		if info, err := os.Stat(d.root); err != nil || !info.IsDir() {
			return usage(fmt.Errorf("--root %s is no folder", d.root))
		}
		if d.registry != "" {
			if _, err := parseRegistry(d.registry); err != nil {
				return usage(err)
			}
		}
		found, err := d.examine(c)
		if err != nil {
			return err
		}
		return tell(c, found, *asJSON)
	}
	return c
}

// parseRegistry reads the address of a registry.
func parseRegistry(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("--registry %q is not an address such as https://mirror.example:5050", s)
	}
	return u, nil
}

// tell prints what was found, and fails if something of it is wrong.
func tell(c *cobra.Command, found []finding, asJSON bool) error {
	wrong := 0
	for _, f := range found {
		if !f.OK {
			wrong++
		}
	}
	if asJSON {
		if err := printJSON(c, found); err != nil {
			return err
		}
	} else {
		for _, f := range found {
			grade := "ok"
			switch {
			case !f.OK:
				grade = "WRONG"
			case f.Note:
				grade = "note"
			}
			fmt.Fprintf(c.OutOrStdout(), "%-6s %-10s %s\n", grade, f.What, printable(f.Says))
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%d of %d findings need a person", wrong, len(found))
	}
	return nil
}

func (d *doctor) examine(c *cobra.Command) ([]finding, error) {
	var s admin.Status
	if err := d.getJSON(c.Context(), "/api/v1/status", nil, &s); err != nil {
		return nil, err
	}
	found := []finding{good("server", "tidemark %s at %s", s.Version, d.server)}
	found = append(found, d.clock(c)...)
	found = append(found, d.front(c.Context(), s.Registry)...)
	for _, w := range s.Warnings {
		found = append(found, bad("warning", "%s", w))
	}
	found = append(found, diskFinding(s.Disk, s.Cache))
	unsigned, err := d.awaitSigned(c.Context())
	if err != nil {
		return nil, err
	}
	ledger := good("ledger", "%s, %d entries, %d signed", s.Log.Origin, s.Log.Size, s.Log.SignedSize)
	if unsigned > 0 {
		ledger = bad("ledger", "%s; %d that should be cannot be proven", ledger.Says, unsigned)
	}
	found = append(found, ledger)
	asked, err := d.upstreams(c, s)
	if err != nil {
		return nil, err
	}
	found = append(found, asked...)
	for _, rule := range s.Policy.Refuses {
		found = append(found, remark("bypass", "rule %q can answer with 404: clients that use this server as a mirror go to the real registry then", rule))
	}
	held, err := d.holds(c)
	if err != nil {
		return nil, err
	}
	found = append(found, held...)
	return append(found, d.clients(c.Context(), s.Registry)...), nil
}

// address is the address of the registry as clients have it.
func (d *doctor) address(r admin.RegistryStatus) string {
	if d.registry != "" {
		return d.registry
	}
	return r.URL
}

// A clock that is wrong makes certificates invalid and the ledger's times useless.
const (
	clockNote  = 5 * time.Second
	clockWrong = time.Minute
)

// clock compares the server's clock with this machine's.
func (d *doctor) clock(c *cobra.Command) []finding {
	req, err := http.NewRequestWithContext(c.Context(), http.MethodGet, d.server+"/healthz", nil)
	if err != nil {
		return nil // told before
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil
	}
	resp.Body.Close()
	t, err := http.ParseTime(resp.Header.Get("Date"))
	if err != nil {
		return nil
	}
	return []finding{clockFinding("the server's clock", time.Until(t), "this machine's")}
}

func clockFinding(whose string, ahead time.Duration, than string) finding {
	says := fmt.Sprintf("%s is within %v of %s", whose, clockNote, than)
	off := ahead.Abs()
	if off >= clockNote {
		says = fmt.Sprintf("%s is %v %s of %s", whose, off.Round(time.Second), map[bool]string{true: "ahead", false: "behind"}[ahead > 0], than)
	}
	switch {
	case off >= clockWrong:
		return bad("clock", "%s", says)
	case off >= clockNote:
		return remark("clock", "%s", says)
	}
	return good("clock", "%s", says)
}

func diskFinding(d admin.DiskStatus, c admin.CacheStatus) finding {
	says := fmt.Sprintf("%s of %s free, %s are left to others; %s cached, at most %s", human(d.Free), human(d.Total), human(d.MinFree), human(c.Bytes), human(c.Budget))
	if d.Free < d.MinFree {
		return remark("disk", "%s", says) // which is warned of
	}
	return good("disk", "%s", says)
}

// upstreams asks every upstream through the server.
func (d *doctor) upstreams(c *cobra.Command, s admin.Status) (found []finding, err error) {
	if s.Offline {
		return []finding{remark("upstream", "offline: none is ever asked")}, nil
	}
	var checks struct{ Upstreams []admin.UpstreamCheck }
	if err := d.postJSON(c.Context(), "/api/v1/upstreams/check", map[string]string{"image": d.image}, &checks); err != nil {
		return nil, err
	}
	conditions := make(map[string]string)
	for _, u := range s.Upstreams {
		if u.Condition != nil {
			conditions[u.Name] = "; " + u.Condition.Type + " since " + stamp(u.Condition.Since)
		}
	}
	asked := d.image == ""
	for _, u := range checks.Upstreams {
		found = append(found, upstreamFinding(u, conditions[u.Name]))
		if u.Image != nil {
			asked = true
			found = append(found, imageFinding(d.image, u, s.Registry.Auth))
		}
		if off := time.Duration(u.ClockAhead * float64(time.Second)); off.Abs() >= clockNote {
			found = append(found, clockFinding("the clock of "+u.Name, off, "the server's"))
		}
	}
	if !asked {
		registry, _, _ := strings.Cut(d.image, "/")
		found = append(found, bad("image", "%s: %s is not one of upstreams; add it there", d.image, registry))
	}
	return found, nil
}

// imageFinding judges how an image is answered. Where clients come with rights of
// their own, a refusal to us says nothing.
func imageFinding(image string, u admin.UpstreamCheck, auth string) finding {
	refused := u.Image.Status == http.StatusUnauthorized || u.Image.Status == http.StatusForbidden
	switch {
	case u.Image.Error == "":
		return good("image", "%s is answered by %s in %d ms", image, u.Name, u.Image.Millis)
	case refused && auth == "passthrough":
		return remark("image", "%s is not for everybody: clients must be logged in to %s (registry.auth.mode: passthrough)", image, u.Name)
	}
	return bad("image", "%s: %s", image, u.Image.Error)
}

// upstreamFinding judges one upstream. A 401 without credentials is an answer: most
// registries want a token, which everybody may have.
func upstreamFinding(u admin.UpstreamCheck, condition string) finding {
	says := fmt.Sprintf("%s answers in %d ms", u.Name, u.Anonymous.Millis)
	if u.Anonymous.Status == http.StatusUnauthorized {
		says += ", and wants a login or a token"
	}
	isBad := u.Anonymous.Status == 0 || u.Anonymous.Status >= 500 || u.Anonymous.Status == http.StatusTooManyRequests
	if isBad {
		says = u.Anonymous.Error
	}
	if u.Own != nil && !isBad {
		says += ", and takes the configured credentials"
		if u.Own.Error != "" {
			says, isBad = u.Name+" does not take the configured credentials: "+u.Own.Error, true
		}
	}
	if n := u.RateLimitRemaining; n != nil {
		says += fmt.Sprintf("; %d requests left of its limit", *n)
	}
	return finding{What: "upstream", OK: !isBad, Says: says + condition}
}

// holds tells what is held, and what of that is not here.
func (d *doctor) holds(c *cobra.Command) (found []finding, err error) {
	tags, err := d.tags(c.Context(), url.Values{"held": {"true"}})
	if err != nil {
		return nil, err
	}
	held := 0
	for _, t := range tags {
		if t.Served == "" || t.Held == nil {
			continue
		}
		held++
		var past admin.History
		if err := d.getJSON(c.Context(), "/api/v1/tags/history", url.Values{"ref": {t.Ref}, "limit": {"1000"}}, &past); err != nil {
			return nil, err
		}
		for _, st := range past.History {
			if st.Digest == t.Served && st.Bytes != "here" {
				found = append(found, bad("bytes", "%s is held at %s, whose bytes are %s", t.Ref, short(t.Served), st.Bytes))
				break
			}
		}
	}
	says := map[bool]string{true: "1 tag is held", false: fmt.Sprintf("%d tags are held", held)}[held == 1]
	return append(found, good("holds", "%s; clients get the digest that is held, which is no error to them", says)), nil
}
