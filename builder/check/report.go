/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package check

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
)

// WriteJSON writes the report as one JSON object.
func (r Report) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(struct {
		OK bool `json:"ok"`
		Report
	}{r.OK(), r})
}

// WriteTable writes the report for a person.
func (r Report) WriteTable(w io.Writer) error {
	if len(r.Handlers) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "HANDLER\tSHIM\tFLAVOUR\tVERSION\tKATA CONFIGURATION")
		for _, h := range r.Handlers {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", h.Name, dash(h.Shim), dash(string(h.Flavour)), dash(h.Version), dash(h.KataConfig))
		}
		fmt.Fprintln(t)
		if err := t.Flush(); err != nil {
			return err
		}
	}
	count := map[Severity]int{}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i, f := range r.Findings {
		if i == 0 {
			fmt.Fprintln(t, "SEVERITY\tCHECK\tFINDING")
		}
		count[f.Severity]++
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.Severity, f.Check, f.Problem)
		fmt.Fprintf(t, "\t\twhy: %s\n", f.Why)
		fmt.Fprintf(t, "\t\tdo:  %s\n", f.Remedy)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(r.Findings) > 0 {
		fmt.Fprintln(w)
	}
	_, err := fmt.Fprintf(w, "%d errors, %d warnings, %d notes\n", count[Error], count[Warning], count[Info])
	return err
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
