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
package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A case that is run again, by the name that it has in the report, is found.
func TestCritestArgs(t *testing.T) {
	for expr, focus := range map[string]string{
		"Image_Volume": "Image.Volume",
		"^" + regexp.QuoteMeta("NRI_plugin_should_receive_a_callback_[Serial]") + "$": "NRI.plugin.should.receive.a.callback",
		"^" + regexp.QuoteMeta("Container_should_start_[a]_stop_[Conformance]") + "$": `Container.should.start.\[a\].stop`,
	} {
		require.Contains(t, critestArgs(expr), "-ginkgo.focus="+focus)
	}
}

// A case that was left out by a focus is no case that was skipped: its result is that
// of the run before.
func TestPrintReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "junit.xml")
	require.NoError(t, os.WriteFile(path, []byte(`<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="4"><testsuite name="CRI validation">
<testcase name="[BeforeSuite]" classname="CRI validation" status="passed" time="0.1"></testcase>
<testcase name="[It] [k8s.io] Container runtime should start/stop [Conformance]" status="passed" time="1.5"></testcase>
<testcase name="[It] [k8s.io] Image fails" status="failed" time="0.5"><failure message="no"></failure></testcase>
<testcase name="[It] [k8s.io] Image panics" status="panicked" time="0.5"></testcase>
<testcase name="[It] [k8s.io] SELinux labels" status="skipped" time="0"><skipped message="skipped - no SELinux"></skipped></testcase>
<testcase name="[It] [k8s.io] not in focus" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
</testsuite></testsuites>`), 0o600))
	var out bytes.Buffer
	require.NoError(t, printReport(path, &out))
	out.WriteString("--- FAIL: TestCRISuite (2.50s)\n")
	got, err := readResults(&out)
	require.NoError(t, err)
	require.Equal(t, results{
		"Container_runtime_should_start_stop_[Conformance]": passed,
		"Image_fails": failed, "Image_panics": failed, "SELinux_labels": skipped,
	}, got)
	alone, err := readResults(strings.NewReader("--- FAIL: TestCRISuite (2.50s)\n"))
	require.NoError(t, err)
	require.Equal(t, results{critestTest: failed}, alone, "the suite did not run")
	require.ErrorContains(t, printReport(path+".no", &out), "without a report")
}
