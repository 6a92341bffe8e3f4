package main

import (
	"encoding/json"
	"fmt"
	"net/url"

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

func newDoctor() *cobra.Command {
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what is wrong, or would go wrong, with a running server",
		Long: `Look at a running server: what it warns of, whether its log is signed, how its
upstreams are, and whether clients can get past what is held or denied. Exit code
1 if something is wrong.`,
		Example: "  tidemark doctor",
		Args:    cobra.NoArgs,
	}
	cl, asJSON := addClient(c), addJSON(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		found, err := cl.examine(c)
		if err != nil {
			return err
		}
		wrong := 0
		for _, f := range found {
			if !f.OK {
				wrong++
			}
		}
		if *asJSON {
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
	return c
}

func (cl *client) examine(c *cobra.Command) ([]finding, error) {
	unsigned, err := cl.awaitSigned(c.Context())
	if err != nil {
		return nil, err
	}
	var s admin.Status
	if err := cl.getJSON(c.Context(), "/api/v1/status", nil, &s); err != nil {
		return nil, err
	}
	found := []finding{{What: "server", OK: true, Says: "tidemark " + s.Version + " at " + cl.server}}
	for _, w := range s.Warnings {
		found = append(found, finding{What: "warning", Says: w})
	}
	ledger := finding{What: "ledger", OK: true, Says: fmt.Sprintf("%s, %d entries, %d signed", s.Log.Origin, s.Log.Size, s.Log.SignedSize)}
	if unsigned > 0 {
		ledger.OK, ledger.Says = false, fmt.Sprintf("%s; %d that should be cannot be proven", ledger.Says, unsigned)
	}
	found = append(found, ledger)
	if s.Offline {
		found = append(found, finding{What: "upstream", OK: true, Note: true, Says: "offline: none is ever asked"})
		s.Upstreams = nil
	}
	for _, u := range s.Upstreams {
		f := finding{What: "upstream", OK: u.Condition == nil, Says: u.Name}
		switch {
		case u.Condition != nil:
			f.Says += ": " + u.Condition.Type + " since " + stamp(u.Condition.Since)
		case u.LastError != "":
			f.Says += ": the last request failed: " + u.LastError
		}
		if n := u.RateLimitRemaining; n != nil {
			f.Says += fmt.Sprintf("; %d requests left of its limit", *n)
		}
		found = append(found, f)
	}
	for _, rule := range s.Policy.Refuses {
		found = append(found, finding{What: "bypass", OK: true, Note: true, Says: fmt.Sprintf("rule %q can answer with 404: clients that use this server as a mirror go to the real registry then", rule)})
	}
	return cl.examineHolds(c, found)
}

// examineHolds tells what is held, and what of that is not here.
func (cl *client) examineHolds(c *cobra.Command, found []finding) ([]finding, error) {
	tags, err := cl.tags(c.Context(), url.Values{"held": {"true"}})
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
		body, err := cl.get(c.Context(), "/api/v1/tags/history", url.Values{"ref": {t.Ref}, "limit": {"1000"}})
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(body, &past); err != nil {
			return nil, err
		}
		for _, st := range past.History {
			if st.Digest == t.Served && st.Bytes != "here" {
				found = append(found, finding{What: "bytes", Says: fmt.Sprintf("%s is held at %s, whose bytes are %s", t.Ref, short(t.Served), st.Bytes)})
				break
			}
		}
	}
	return append(found, finding{What: "holds", OK: true, Says: fmt.Sprintf("%d tags are held; clients get the digest from before, which is no error to them", held)}), nil
}
