reg [7:0] m [0:9];
initial $readmemh("/etc/hostname", m);
assign q = m[0];
endmodule
